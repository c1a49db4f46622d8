"""LoRA (arXiv:2106.09685): a product of two thin matrices, on fused layers also one for each of q, k and v."""

# I in features, O out features, R rank, P parts of a fused layer; a name without axes has any between B and I

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from sd3pipe.adapters.fusing import PATCH_AXES, Rows, block_diagonal, diagonal_blocks, rows_of_part
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, Product, kaiming_uniform, on_cpu, ratio
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS, AdapterSpec
from sd3pipe.errors import InputError


class LoRA(AdapterLayer):
    """scale * up(down(x)): down starts as torch's linear layers do, up at zero."""

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.down = setup.parameter(setup.rank, setup.in_features)
        self.up = setup.parameter(setup.out_features, setup.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.down.copy_(kaiming_uniform(tuple(self.down.shape), generator))
        self.up.zero_()

    def term(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.down.to(x.dtype))
        return self.raised(self.drop_ranks(low) * self.setup.scale)

    def raised(self, low: Tensor) -> Tensor:
        """Returns up(low) [..., O] for rank activations [..., R]."""
        return functional.linear(low, self.up.to(low.dtype))

    def delta(self) -> Delta:
        return LoRADelta(down=on_cpu(self.down), up=on_cpu(self.up), alpha=self.setup.alpha)

    @torch.no_grad()
    def limit_norm(self, largest: float) -> tuple[Tensor, Tensor]:
        down, up = self.down.float(), self.up.float()
        return self._shrink(((up.T @ up) * (down @ down.T)).sum(), largest)

    def _shrink(self, squared_norm: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        norm = squared_norm.clamp_min(0.0).sqrt() * abs(self.setup.scale)
        ratio = (largest / norm.clamp_min(largest)).sqrt()
        self.down.mul_(ratio)
        self.up.mul_(ratio)
        return norm.clamp_max(largest), norm > largest


class SplitLoRA(LoRA):
    """LoRA on a fused q, k, v layer with a rank of its own for each of the three: up is block-diagonal.

    As one LoRA it has rank 3 R, so its alpha is 3 alpha: sd-scripts' `split_qkv` leaves it, and acts at a third.
    """

    def __init__(self, setup: LayerSetup) -> None:
        AdapterLayer.__init__(self, setup)
        self.down = setup.parameter(QKV_PARTS * setup.rank, setup.in_features)
        self.up = setup.parameter(QKV_PARTS, setup.out_features // QKV_PARTS, setup.rank)

    def raised(self, low: Tensor) -> Tensor:
        parts = zip(low.chunk(QKV_PARTS, dim=-1), self.up.to(low.dtype), strict=True)
        return torch.cat([functional.linear(low_part, up_OR) for low_part, up_OR in parts], dim=-1)

    def delta(self) -> "LoRADelta":
        up_OR = torch.block_diag(*on_cpu(self.up))
        return LoRADelta(down=on_cpu(self.down), up=up_OR, alpha=QKV_PARTS * self.setup.alpha)

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        tensors = delta.tensors()
        blocks = diagonal_blocks(tensors["up"])
        if blocks is None:
            raise InputError("the file was not trained with split_qkv: its q, k and v share ranks")
        self.down.copy_(tensors["down"])
        self.up.copy_(torch.stack(blocks))

    @torch.no_grad()
    def limit_norm(self, largest: float) -> tuple[Tensor, Tensor]:
        down_PRI = self.down.float().unflatten(0, (QKV_PARTS, -1))
        up_POR = self.up.float()
        return self._shrink(((up_POR.mT @ up_POR) * (down_PRI @ down_PRI.mT)).sum(), largest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoRADelta(Delta):
    """W + (alpha / R) up down, of up [O, R] and down [R, I]."""

    algorithm: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    options: ClassVar[frozenset[str]] = frozenset((
        "network_alpha", "network_dropout", "rank_dropout", "loraplus_lr_ratio", "scale_weight_norms", "split_qkv",
        "rs_lora",
    ))  # fmt: skip
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora.down.weight",
                 ".lora_linear_layer.down.weight", "_lora.down.weight"),
        "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B", ".lora.up.weight",
               ".lora_linear_layer.up.weight", "_lora.up.weight"),
    }  # fmt: skip
    network_module: ClassVar[str] = "networks.lora_sd3"
    layer_class: ClassVar[type[AdapterLayer]] = LoRA

    down: Tensor
    up: Tensor

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"up {list(self.up.shape)} and down {list(self.down.shape)} do not match")

    @classmethod
    def of(cls, product: Product) -> Self:
        """Returns a product as a LoRA of as many ranks as it has."""
        return cls(down=product.down, up=product.up, alpha=product.scale * product.down.shape[0])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def balanced(self) -> Self:
        """Moves a power of two between the factors, away from fp16's subnormal numbers."""
        largest_down, largest_up = float(self.down.abs().max()), float(self.up.abs().max())
        if not largest_down or not largest_up:
            return self
        factor = 2.0 ** round(math.log2(largest_down / largest_up) / 2)
        return replace(self, down=self.down.float() / factor, up=self.up.float() * factor)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.up.to(dtype) @ self.down.to(dtype)) * self.scale

    def product(self) -> Product | None:
        return Product(self.up, self.down, self.scale)

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        return (self if rows is None else self.with_rows(rows)).dense()

    def norm(self) -> float:
        """Returns |scale up down| without forming it."""
        return abs(self.scale) * product_norm(self.up, self.down)

    def _difference(self, other: Delta) -> float:
        """Compares without forming the products, where both are some.

        At equal rank |B A - B' A'| is taken as (B - B') A + B' (A - A'), where small differences do not cancel.
        """
        if not isinstance(other, LoRADelta):
            return Delta._difference(self, other)
        up_1, up_2 = self.up.double() * self.scale, other.up.double() * other.scale
        down_1, down_2 = self.down.double(), other.down.double()
        if self.rank == other.rank:
            apart = product_norm(torch.cat([up_1 - up_2, up_2], dim=1), torch.cat([down_1, down_1 - down_2]))
        else:
            apart = product_norm(torch.cat([up_1, -up_2], dim=1), torch.cat([down_1, down_2]))
        return ratio(apart, self.norm())

    def with_rows(self, rows: Rows) -> Self:
        return replace(self, up=rows(self.up))

    def split(self) -> Mapping[int, Self]:
        """Returns the changes of q, k and v: with ranks of their own where up is block-diagonal, else with one down."""
        blocks = diagonal_blocks(self.up)
        if blocks is None or not all(bool(block.any()) for block in blocks):
            return {index: self.with_rows(rows_of_part(index)) for index in range(QKV_PARTS)}
        return {
            index: replace(self, down=down, up=block, alpha=self.alpha / QKV_PARTS)
            for index, (down, block) in enumerate(zip(self.down.chunk(QKV_PARTS), blocks, strict=True))
        }

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self:
        """Returns the LoRA of the fused layer: of the parts' rank where they share down, else of all ranks."""
        first = next(iter(parts.values()))
        rows = first.shape[0]
        same_scale = all(delta.scale == first.scale for delta in parts.values())
        if same_scale and all(torch.equal(delta.down, first.down) for delta in parts.values()):
            none = first.up.new_zeros(rows, first.rank)
            up = torch.cat([parts[index].up if index in parts else none for index in range(QKV_PARTS)])
            return cls(down=first.down, up=up, alpha=first.alpha)
        if not same_scale:
            parts = {index: delta.with_scale_in_up() for index, delta in parts.items()}
        down = torch.cat([parts[index].down for index in sorted(parts)])
        up = block_diagonal({index: delta.up for index, delta in parts.items()}, rows)
        return cls(down=down, up=up, alpha=(first.scale if same_scale else 1.0) * down.shape[0])

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        down, up = parts.matrices("down", "up")
        return cls(down=down, up=up, alpha=parts.alpha(down.shape[0]))

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        down, up = ("lora_down", "lora_up") if form == "comfyui" else ("lora_A", "lora_B")
        axes = self.down.unflatten(1, PATCH_AXES), self.up[:, :, None, None]
        factors = axes if patches else (self.down, self.up)
        return {f"{down}.weight": factors[0], f"{up}.weight": factors[1]}

    def held_by(self, form: Form) -> Self:
        return self.with_scale_in_up() if form == "diffusers" else self

    def with_scale_in_up(self) -> Self:
        """Returns the same change with alpha = rank."""
        if self.scale == 1.0:
            return self
        return replace(self, up=self.up.float() * self.scale, alpha=float(self.rank))

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        return SplitLoRA(setup) if spec.split_qkv and path.endswith(".qkv") else cls.layer_class(setup)


def product_norm(left_OR: Tensor, right_RI: Tensor) -> float:
    """Returns the Frobenius norm of left @ right in fp64 without forming it: |L R|^2 = <L^T L, R R^T>."""
    left_OR, right_RI = left_OR.double(), right_RI.double()
    return float(((left_OR.T @ left_OR) * (right_RI @ right_RI.T)).sum().clamp_min(0.0).sqrt())
