"""LoHa (arXiv:2108.06098): an element-wise product of two low-rank matrices, with LyCORIS' names and start values."""

# I in features, O out features, R rank

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from sd3pipe.adapters.fusing import Rows, block_diagonal
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, on_cpu, ratio
from sd3pipe.adapters.parts import LayerParts

_Term: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # (w1_a w1_b) * (w2_a w2_b)

_ROWS = 64  # of a product at a time, which stay in the processor's cache
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

    def norm(self) -> float:
        return _norm_of_sum([(self.w1_a.double() * self.scale, self.w1_b, self.w2_a, self.w2_b)])

    def _difference(self, other: Delta) -> float:
        """Compares without forming the products, where both have one rank.

        X1 * X2 - Y1 * Y2 is taken as (X1 - Y1) * X2 + Y1 * (X2 - Y2), in which A B - A' B' is
        (A - A') B + A' (B - B'): small differences do not cancel.
        """
        if not isinstance(other, LoHaDelta) or self.rank != other.rank:
            return Delta._difference(self, other)
        a1, b1, a2, b2 = (tensor.double() for tensor in self.tensors().values())
        a1_, b1_, a2_, b2_ = (tensor.double() for tensor in other.tensors().values())
        a1, a1_ = a1 * self.scale, a1_ * other.scale
        terms = [
            (torch.cat([a1 - a1_, a1_], dim=1), torch.cat([b1, b1 - b1_]), a2, b2),
            (a1_, b1_, torch.cat([a2 - a2_, a2_], dim=1), torch.cat([b2, b2 - b2_])),
        ]
        return ratio(_norm_of_sum(terms), self.norm())

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


def _norm_of_sum(terms: Sequence[_Term]) -> float:
    """Returns the Frobenius norm of a sum of element-wise products, taken in fp32 some rows after the other.

    Each factor is brought to a largest entry of 1, so that none is beyond fp32's range.
    """
    parts = [[_in_units(factor) for factor in term] for term in terms]
    units = [math.prod(unit for _, unit in part) for part in parts]
    largest = max(units) or 1.0
    for ((w1_a, _), *_), unit in zip(parts, units, strict=True):
        w1_a *= unit / largest
    squared = 0.0
    for start in range(0, len(terms[0][0]), _ROWS):
        some = slice(start, start + _ROWS)
        first, *more = [
            (w1_a[some] @ w1_b).mul_(w2_a[some] @ w2_b) for (w1_a, _), (w1_b, _), (w2_a, _), (w2_b, _) in parts
        ]
        for term in more:
            first += term
        squared += float(first.square_().sum())
    return largest * math.sqrt(squared)


def _in_units(factor: Tensor) -> tuple[Tensor, float]:
    """Returns a factor in fp32 and in units of its largest entry, and that."""
    unit = float(factor.abs().max())
    return (factor.double() / (unit or 1.0)).float(), unit
