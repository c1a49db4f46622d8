"""What an adapter does to one linear layer, as its factors: the form that all layers and file formats share.

An adapter is a mapping from module path ("joint_blocks.0.x_block.attn.qkv") to one of these.
"""

# O out features, I in features, R rank

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Algorithm = Literal["lora", "dora", "loha", "lokr"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoRADelta:
    """W + (alpha / R) up down, of up [O, R] and down [R, I]; with a magnitude [O] (DoRA) its rows are then scaled.

    They are scaled by magnitude / |row of the sum|, as in the paper and in peft; or, where `base_norm` is set, by
    magnitude / |row of W|, which is what ComfyUI does with a magnitude per output row.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    base_norm: bool = False

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"up {list(self.up.shape)} and down {list(self.down.shape)} do not match")
        if self.magnitude is not None and self.magnitude.shape != self.up.shape[:1]:
            raise ValueError(f"magnitude {list(self.magnitude.shape)} does not match up {list(self.up.shape)}")

    @property
    def algorithm(self) -> Algorithm:
        return "lora" if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name."""
        tensors = {"down": self.down, "up": self.up}
        return tensors if self.magnitude is None else tensors | {"magnitude": self.magnitude}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns (alpha / R) up down [O, I]: for DoRA the change of direction alone."""
        return (self.up.to(dtype) @ self.down.to(dtype)) * self.scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoHaDelta:
    """W + (alpha / R) (w1_a w1_b) * (w2_a w2_b), an element-wise product of w._a [O, R] and w._b [R, I]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    def __post_init__(self) -> None:
        first, second = (self.w1_a, self.w1_b), (self.w2_a, self.w2_b)
        for a, b in (first, second):
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.shape[0] != self.w1_a.shape[0]:
                raise ValueError(f"the Hadamard factors {list(a.shape)} and {list(b.shape)} do not match")
        if self.w1_b.shape[1] != self.w2_b.shape[1]:
            raise ValueError("the two Hadamard factors differ in width")

    @property
    def algorithm(self) -> Algorithm:
        return "loha"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name."""
        return {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the change of the weight [O, I]."""
        first = self.w1_a.to(dtype) @ self.w1_b.to(dtype)
        return first * (self.w2_a.to(dtype) @ self.w2_b.to(dtype)) * self.scale


Factor: TypeAlias = Tensor | tuple[Tensor, Tensor]  # a whole matrix, or the product of two thin ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoKrDelta:
    """W + scale (w1 kron w2), each factor whole or the product of two thin matrices (LyCORIS, arXiv:2309.14859)."""

    w1: Factor
    w2: Factor
    alpha: float

    def __post_init__(self) -> None:
        for factor in (self.w1, self.w2):
            parts = factor if isinstance(factor, tuple) else (factor,)
            thin = len(parts) == 2 and parts[0].shape[-1] != parts[1].shape[0]
            if thin or any(part.ndim != 2 for part in parts):
                raise ValueError(f"the Kronecker factors {[list(part.shape) for part in parts]} do not match")

    @property
    def algorithm(self) -> Algorithm:
        return "lokr"

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by; 0 where both factors are whole and alpha does not count."""
        for factor in (self.w2, self.w1):  # LyCORIS and ComfyUI let the second factor decide
            if isinstance(factor, tuple):
                return factor[0].shape[1]
        return 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shape(self) -> tuple[int, int]:
        (rows_1, columns_1), (rows_2, columns_2) = factor_shape(self.w1), factor_shape(self.w2)
        return rows_1 * rows_2, columns_1 * columns_2

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name."""
        tensors: dict[str, Tensor] = {}
        for name, factor in (("w1", self.w1), ("w2", self.w2)):
            if isinstance(factor, tuple):
                tensors |= {f"{name}_a": factor[0], f"{name}_b": factor[1]}
            else:
                tensors[name] = factor
        return tensors

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the change of the weight [O, I]."""
        return torch.kron(multiplied(self.w1, dtype).contiguous(), multiplied(self.w2, dtype).contiguous()) * self.scale


Delta: TypeAlias = LoRADelta | LoHaDelta | LoKrDelta
Adapter: TypeAlias = Mapping[str, Delta]


def factor_shape(factor: Factor) -> tuple[int, int]:
    """Returns the rows and columns of a Kronecker factor."""
    if isinstance(factor, tuple):
        return factor[0].shape[0], factor[1].shape[1]
    return factor.shape[0], factor.shape[1]


def multiplied(factor: Factor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a Kronecker factor as one matrix, in `dtype` or as it is stored."""
    if isinstance(factor, tuple):
        return factor[0].to(dtype or factor[0].dtype) @ factor[1].to(dtype or factor[1].dtype)
    return factor.to(dtype or factor.dtype)


def with_norm_of(delta: LoRADelta, weight_OI: Tensor, *, base_norm: bool) -> LoRADelta:
    """Returns the same change of `weight_OI` with a magnitude over the norms of the other kind."""
    if delta.magnitude is None or delta.base_norm == base_norm:
        return delta
    ratio_O = _row_norms(weight_OI, delta) / _row_norms(weight_OI, replace(delta, base_norm=base_norm))
    return replace(delta, magnitude=delta.magnitude.float() / ratio_O, base_norm=base_norm)


def _row_norms(weight_OI: Tensor, delta: LoRADelta) -> Tensor:
    """Returns the norms that the magnitude of `delta` is divided by."""
    return merged_row_norms(weight_OI, delta.down, delta.up, 0.0 if delta.base_norm else delta.scale)


def merged_row_norms(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """Returns sqrt(|w|^2 + 2 s <w, b A> + s^2 |b A|^2) for each row w of W and b of up, in fp32."""
    weight_OI, down_RI, up_OR = weight_OI.float(), down_RI.float(), up_OR.float()
    crossed_O = ((weight_OI @ down_RI.T) * up_OR).sum(1)
    squared_O = ((up_OR @ (down_RI @ down_RI.T)) * up_OR).sum(1)
    total_O = weight_OI.square().sum(1) + 2.0 * scale * crossed_O + scale * scale * squared_O
    return total_O.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def merged_weight(weight_OI: Tensor, delta: Delta, strength: float = 1.0) -> Tensor:
    """Returns the base weight with the adapter in it, in fp32: W + strength (W' - W)."""
    weight_OI = weight_OI.float()
    change_OI = delta.dense()
    if isinstance(delta, LoRADelta) and delta.magnitude is not None:
        gain_O = delta.magnitude.float() / _row_norms(weight_OI, delta)
        change_OI = gain_O[:, None] * (weight_OI + change_OI) - weight_OI
    return weight_OI + strength * change_OI


def on_device(delta: Delta, device: torch.device | str) -> Delta:
    """Returns the delta with its factors on a device."""
    moved = {name: tensor.to(device) for name, tensor in delta.tensors().items()}
    if not isinstance(delta, LoKrDelta):
        return replace(delta, **moved)
    w1, w2 = (moved[name] if name in moved else (moved[f"{name}_a"], moved[f"{name}_b"]) for name in ("w1", "w2"))
    return LoKrDelta(w1=w1, w2=w2, alpha=delta.alpha)


def delta_norm(delta: Delta) -> float:
    """Returns the Frobenius norm of the change of the weight; for a LoRA without forming it."""
    if isinstance(delta, LoRADelta):
        return abs(delta.scale) * product_norm(delta.up, delta.down)
    return float(torch.linalg.vector_norm(delta.dense(torch.float64)))


def product_norm(left_OR: Tensor, right_RI: Tensor) -> float:
    """Returns the Frobenius norm of left @ right in fp64 without forming it: |L R|^2 = <L^T L, R R^T>."""
    left_OR, right_RI = left_OR.double(), right_RI.double()
    return float(((left_OR.T @ left_OR) * (right_RI @ right_RI.T)).sum().clamp_min(0.0).sqrt())


def difference(first: Delta, second: Delta) -> float:
    """Returns |first - second| / |first| of the effective changes; 0 where all factors are equal bit for bit."""
    if same_factors(first, second):
        return 0.0
    if first.shape != second.shape:
        return math.inf
    if isinstance(first, LoRADelta) and isinstance(second, LoRADelta):
        return _lora_difference(first, second)
    dense = first.dense(torch.float64)
    return _ratio(float(torch.linalg.vector_norm(dense - second.dense(torch.float64))), delta_norm(first))


def _lora_difference(first: LoRADelta, second: LoRADelta) -> float:
    if first.algorithm != second.algorithm or first.base_norm != second.base_norm:
        return math.inf
    direction = _ratio(_product_difference(first, second), delta_norm(first))
    if first.magnitude is None or second.magnitude is None:
        return direction
    apart = torch.linalg.vector_norm(first.magnitude.double() - second.magnitude.double())
    return max(direction, _ratio(float(apart), float(torch.linalg.vector_norm(first.magnitude.double()))))


def _product_difference(first: LoRADelta, second: LoRADelta) -> float:
    """Returns |B A - B' A'|. At equal rank as (B - B') A + B' (A - A'), where small differences do not cancel."""
    up_1, up_2 = first.up.double() * first.scale, second.up.double() * second.scale
    down_1, down_2 = first.down.double(), second.down.double()
    if first.rank == second.rank:
        return product_norm(torch.cat([up_1 - up_2, up_2], dim=1), torch.cat([down_1, down_1 - down_2]))
    return product_norm(torch.cat([up_1, -up_2], dim=1), torch.cat([down_1, down_2]))


def _ratio(apart: float, norm: float) -> float:
    if apart == 0.0:
        return 0.0
    return apart / norm if norm > 0.0 else math.inf


def same_factors(first: Delta, second: Delta) -> bool:
    """Whether two deltas are equal bit for bit, whatever number format holds them."""
    ours, theirs = first.tensors(), second.tensors()
    return (
        (first.algorithm, _base_norm(first)) == (second.algorithm, _base_norm(second))
        and first.scale == second.scale
        and ours.keys() == theirs.keys()
        and all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())
    )


def _base_norm(delta: Delta) -> bool:
    return isinstance(delta, LoRADelta) and delta.base_norm
