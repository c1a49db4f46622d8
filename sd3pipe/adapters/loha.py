"""LoHa (arXiv:2108.06098): an element-wise product of two low-rank matrices, with LyCORIS' names and start values."""

# I in features, O out features, R rank

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from sd3pipe.adapters.fusing import Rows, block_diagonal
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, on_cpu
from sd3pipe.adapters.parts import LayerParts

_NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


class LoHa(AdapterLayer):
    """scale * ((w1_a w1_b) * (w2_a w2_b)) x."""

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.w1_a = setup.parameter(setup.out_features, setup.rank)
        self.w1_b = setup.parameter(setup.rank, setup.in_features)
        self.w2_a = setup.parameter(setup.out_features, setup.rank)
        self.w2_b = setup.parameter(setup.rank, setup.in_features)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for factor, deviation in ((self.w1_a, 0.1), (self.w1_b, 1.0), (self.w2_b, 1.0)):
            factor.copy_(torch.randn(factor.shape, generator=generator) * deviation)
        self.w2_a.zero_()

    def term(self, x: Tensor) -> Tensor:
        weight_OI = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b) * self.setup.scale
        return functional.linear(x, weight_OI.to(x.dtype))

    def delta(self) -> "LoHaDelta":
        w1_a, w1_b, w2_a, w2_b = map(on_cpu, self.parameters())
        return LoHaDelta(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=self.setup.alpha)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoHaDelta(Delta):
    """W + (alpha / R) (w1_a w1_b) * (w2_a w2_b), of w._a [O, R] and w._b [R, I]."""

    algorithm: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    network_args: ClassVar[Mapping[str, str]] = {"algo": "loha"}
    options: ClassVar[frozenset[str]] = frozenset({"rs_lora", "network_alpha"})
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {f"hada_{name}": (f".hada_{name}",) for name in _NAMES}
    file_prefix: ClassVar[str] = "hada_"
    layer_class: ClassVar[type[AdapterLayer]] = LoHa

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __post_init__(self) -> None:
        for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b)):
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.shape[0] != self.w1_a.shape[0]:
                raise ValueError(f"the Hadamard factors {list(a.shape)} and {list(b.shape)} do not match")
        if self.w1_b.shape[1] != self.w2_b.shape[1]:
            raise ValueError("the two Hadamard factors differ in width")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        first = self.w1_a.to(dtype) @ self.w1_b.to(dtype)
        return first * (self.w2_a.to(dtype) @ self.w2_b.to(dtype)) * self.scale

    def with_rows(self, rows: Rows) -> Self:
        return replace(self, w1_a=rows(self.w1_a), w2_a=rows(self.w2_a))

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self:
        first = next(iter(parts.values()))
        rows, order = first.shape[0], sorted(parts)
        w1_a = {
            index: delta.w1_a if delta.scale == first.scale else delta.w1_a.float() * (delta.scale / first.scale)
            for index, delta in parts.items()
        }
        w1_b = torch.cat([parts[index].w1_b for index in order])
        return cls(
            w1_a=block_diagonal(w1_a, rows),
            w1_b=w1_b,
            w2_a=block_diagonal({index: delta.w2_a for index, delta in parts.items()}, rows),
            w2_b=torch.cat([parts[index].w2_b for index in order]),
            alpha=first.scale * w1_b.shape[0],
        )

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        w1_a, w1_b, w2_a, w2_b = parts.matrices(*cls.part_names)
        return cls(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=parts.alpha(w1_b.shape[0]))
