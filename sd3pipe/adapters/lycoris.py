"""LoHa (arXiv:2108.06098) and LoKr (arXiv:2309.14859), with LyCORIS' names, start values and scales."""

# I in features, O out features, R rank; in a Kronecker product I = M N, O = L K with w1 [L, M] and w2 [K, N]

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.adapters.deltas import Delta, Factor, LoHaDelta, LoKrDelta
from sd3pipe.adapters.layers import AdapterLayer, LayerSetup, kaiming_uniform, on_cpu


class LoHa(AdapterLayer):
    """scale * ((w1_a w1_b) * (w2_a w2_b)) x, an element-wise product of two low-rank matrices."""

    algorithm = "loha"

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

    def delta(self) -> LoHaDelta:
        return LoHaDelta(
            w1_a=on_cpu(self.w1_a),
            w1_b=on_cpu(self.w1_b),
            w2_a=on_cpu(self.w2_a),
            w2_b=on_cpu(self.w2_b),
            alpha=self.setup.alpha,
        )

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        for factor, tensor in zip(self.parameters(), delta.tensors().values(), strict=True):
            factor.copy_(tensor)


class LoKr(AdapterLayer):
    """scale * (w1 kron w2) x, where each factor is a whole matrix or the product of two thin ones.

    `shapes` names the trained tensors: w1 or w1_a and w1_b, w2 or w2_a and w2_b.
    """

    algorithm = "lokr"

    def __init__(self, setup: LayerSetup, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(setup)
        self.w1 = nn.ParameterList(setup.parameter(*shapes[name]) for name in ("w1", "w1_a", "w1_b") if name in shapes)
        self.w2 = nn.ParameterList(setup.parameter(*shapes[name]) for name in ("w2", "w2_a", "w2_b") if name in shapes)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for factor in (*self.w1, *self.w2):
            factor.copy_(kaiming_uniform(tuple(factor.shape), generator))
        self.w2[-1].zero_()

    def term(self, x: Tensor) -> Tensor:
        columns_M = self.w1[-1].shape[1]
        inner = _applied(x.unflatten(-1, (columns_M, -1)), self.w2)  # [..., M, K]
        outer = _applied(inner.mT, self.w1)  # [..., K, L]
        return outer.mT.flatten(-2) * self._scale

    @property
    def _scale(self) -> float:
        return self.setup.scale if len(self.w1) + len(self.w2) > 2 else 1.0

    def delta(self) -> LoKrDelta:
        return LoKrDelta(w1=_factor(self.w1), w2=_factor(self.w2), alpha=self.setup.alpha)

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        for factor, tensor in zip((*self.w1, *self.w2), delta.tensors().values(), strict=True):
            factor.copy_(tensor)


def lokr_shapes(out_features: int, in_features: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    """Returns LyCORIS' choice: w1 whole and small; w2 thin where the rank is below half of its longer side."""
    rows_L, rows_K = factor_pair(out_features, factor)
    columns_M, columns_N = factor_pair(in_features, factor)
    if rank < max(rows_K, columns_N) / 2:
        return {"w1": (rows_L, columns_M), "w2_a": (rows_K, rank), "w2_b": (rank, columns_N)}
    return {"w1": (rows_L, columns_M), "w2": (rows_K, columns_N)}


def factor_pair(number: int, largest: int = -1) -> tuple[int, int]:
    """Returns (m, n) with m n = number and m <= n, m as large as can be and at most `largest` (-1: any)."""
    bound = math.isqrt(number) if largest < 1 else min(largest, math.isqrt(number))
    smaller = max(m for m in range(1, bound + 1) if number % m == 0)
    return smaller, number // smaller


def _applied(x: Tensor, factor: Iterable[Tensor]) -> Tensor:
    """Returns x F^T for a factor given as one matrix, or as the two whose product it is."""
    for matrix in reversed(list(factor)):
        x = functional.linear(x, matrix.to(x.dtype))
    return x


def _factor(parameters: nn.ParameterList) -> Factor:
    matrices = [on_cpu(parameter) for parameter in parameters]
    return matrices[0] if len(matrices) == 1 else (matrices[0], matrices[1])
