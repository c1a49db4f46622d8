"""LoKr (arXiv:2309.14859): a Kronecker product, with LyCORIS' names, start values and choice of factors."""

# I in features, O out features, R rank; in a Kronecker product I = M N, O = L K with w1 [L, M] and w2 [K, N]

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.adapters.full import FullDelta
from sd3pipe.adapters.fusing import Rows
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, Product, kaiming_uniform, on_cpu, ratio
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.weights import lokr_shapes

Factor: TypeAlias = tuple[Tensor, ...]  # a whole matrix, or two thin ones whose product it is

_NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoKrDelta(Delta):
    """W + scale (w1 kron w2), each factor whole or the product of two thin matrices."""

    algorithm: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    network_args: ClassVar[Mapping[str, str]] = {"algo": "lokr"}
    options: ClassVar[frozenset[str]] = frozenset({"lokr_factor", "rs_lora", "network_alpha"})
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {f"lokr_{name}": (f".lokr_{name}",) for name in _NAMES}
    file_prefix: ClassVar[str] = "lokr_"

    w1: Factor
    w2: Factor

    def __post_init__(self) -> None:
        for factor in (self.w1, self.w2):
            apart = len(factor) == 2 and factor[0].shape[-1] != factor[1].shape[0]
            if apart or any(matrix.ndim != 2 for matrix in factor):
                raise ValueError(f"the Kronecker factors {[list(matrix.shape) for matrix in factor]} do not match")

    @property
    def rank(self) -> int:
        for factor in (self.w2, self.w1):  # LyCORIS and ComfyUI let the second factor decide
            if len(factor) == 2:
                return factor[0].shape[1]
        return 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, factor in (("w1", self.w1), ("w2", self.w2)):
            names = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b")
            tensors |= zip(names, factor, strict=True)
        return tensors

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        w1, w2 = (tuple(tensors[name] for name in names if name in tensors) for names in (_NAMES[:3], _NAMES[3:]))
        return replace(self, w1=w1, w2=w2)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.kron(_multiplied(self.w1, dtype), _multiplied(self.w2, dtype)) * self.scale

    def product(self) -> Product | None:
        """Returns w1 kron (a b) as (w1 kron a) (1 kron b), or as (1 kron a) (w1 kron b) where that has fewer ranks."""
        if len(self.w2) == 1:
            return None
        w1_LM, a_KR, b_RN = _multiplied(self.w1, torch.float32), *(matrix.float() for matrix in self.w2)
        rows_L, columns_M = w1_LM.shape
        if rows_L < columns_M:
            return Product(torch.kron(torch.eye(rows_L).to(a_KR), a_KR), torch.kron(w1_LM, b_RN), self.scale)
        return Product(torch.kron(w1_LM, a_KR), torch.kron(torch.eye(columns_M).to(b_RN), b_RN), self.scale)

    def norm(self) -> float:
        """Returns |scale w1 kron w2|, which is |scale| |w1| |w2|."""
        return abs(self.scale) * math.prod(_norm(_multiplied(factor, torch.float64)) for factor in (self.w1, self.w2))

    def _difference(self, other: Delta) -> float:
        """Compares without forming the products, where both have factors of the same sizes.

        With w1 = t w1' + e and e at right angles to w1', w1 kron w2 - w1' kron w2' = w1' kron (t w2 - w2') + e kron w2,
        two terms at right angles, so that nothing cancels.
        """
        if not isinstance(other, LoKrDelta):
            return Delta._difference(self, other)
        first_LM, theirs_LM = (_multiplied(delta.w1, torch.float64) * delta.scale for delta in (self, other))
        second_KN, theirs_KN = (_multiplied(delta.w2, torch.float64) for delta in (self, other))
        if first_LM.shape != theirs_LM.shape:
            return Delta._difference(self, other)
        squared = (theirs_LM * theirs_LM).sum()
        times = (first_LM * theirs_LM).sum() / squared if squared else squared
        along = _norm(theirs_LM) * _norm(times * second_KN - theirs_KN)
        aside = _norm(first_LM - times * theirs_LM) * _norm(second_KN)
        return ratio(math.hypot(along, aside), self.norm())

    def with_rows(self, rows: Rows) -> Delta:
        """Returns some rows as another kind: a Kronecker product has none of its own."""
        product = self.product()
        if product is not None:
            return LoRADelta.of(product).with_rows(rows)
        return FullDelta.of(rows(self.dense()))

    def scaled(self, weight: float) -> Self:
        if self.rank:
            return replace(self, alpha=self.alpha * weight)
        return replace(self, w1=(_multiplied(self.w1) * weight,))

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        own = parts.own_alpha()
        w1, w2 = _read_factor(parts, "lokr_w1"), _read_factor(parts, "lokr_w2")
        delta = cls(w1=w1, w2=w2, alpha=1.0 if own is None else own)
        if delta.rank:
            return replace(delta, alpha=parts.alpha(delta.rank))
        scale = parts.strength(None) if own is None else None  # LyCORIS gives whole factors no scale, peft its own
        return delta if scale is None else replace(delta, w1=(_multiplied(delta.w1, torch.float32) * scale,))

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        return LoKr(setup, lokr_shapes(setup.out_features, setup.in_features, setup.rank, spec.lokr_factor))

    def layer(self, setup: LayerSetup) -> AdapterLayer:
        return LoKr(setup, {name: tuple(tensor.shape) for name, tensor in self.tensors().items()})


def _multiplied(factor: Factor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a factor as one matrix, in `dtype` or as it is stored."""
    first, *second = (matrix.to(dtype or matrix.dtype) for matrix in factor)
    return (first @ second[0] if second else first).contiguous()


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _read_factor(parts: LayerParts, name: str) -> Factor:
    names = (name,) if name in parts.tensors else (f"{name}_a", f"{name}_b")
    return tuple(parts.matrices(*names))


class LoKr(AdapterLayer):
    """scale * (w1 kron w2) x, where each factor is a whole matrix or the product of two thin ones.

    `shapes` names the trained tensors: w1 or w1_a and w1_b, w2 or w2_a and w2_b.
    """

    def __init__(self, setup: LayerSetup, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(setup)
        self.w1 = nn.ParameterList(setup.parameter(*shapes[name]) for name in _NAMES[:3] if name in shapes)
        self.w2 = nn.ParameterList(setup.parameter(*shapes[name]) for name in _NAMES[3:] if name in shapes)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for factor in (*self.w1, *self.w2):
            factor.copy_(kaiming_uniform(tuple(factor.shape), generator))
        self.w2[-1].zero_()

    def term(self, x: Tensor) -> Tensor:
        columns_M = self.w1[-1].shape[1]
        inner = _applied(x.unflatten(-1, (columns_M, -1)), self.w2)  # [..., M, K]
        outer = _applied(inner.mT, self.w1)  # [..., K, L]
        scale = self.setup.scale if len(self.w1) + len(self.w2) > 2 else 1.0  # whole factors have no rank
        return outer.mT.flatten(-2) * scale

    def delta(self) -> LoKrDelta:
        return LoKrDelta(w1=tuple(map(on_cpu, self.w1)), w2=tuple(map(on_cpu, self.w2)), alpha=self.setup.alpha)


def _applied(x: Tensor, factor: Iterable[Tensor]) -> Tensor:
    """Returns x F^T for a factor given as one matrix, or as the two whose product it is."""
    for matrix in reversed(list(factor)):
        x = functional.linear(x, matrix.to(x.dtype))
    return x
