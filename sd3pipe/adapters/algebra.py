"""Changing ranks, adding adapters up, and finding the adapter between two models. All in fp64 or fp32 on the CPU."""

# O out features, I in features, R rank

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3pipe.adapters.kind import Adapter, Delta, Product
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.errors import ParameterError

_EXACT_SIDE = 1024  # matrices with a side up to this are decomposed exactly, larger ones by random projection
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6
_BY_EXTRACTION = "export it with --format checkpoint, then `sd3pipe adapter extract`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """A LoRA near a change, the change's squared norm, and the share of it that the LoRA holds."""

    delta: LoRADelta
    squared_norm: float
    kept: float


@dataclass(frozen=True, slots=True)
class _Factors:
    """The largest singular values of a matrix with their vectors, and the squared norm of the whole matrix."""

    left: Tensor  # [O, R]
    values: Tensor  # [R]
    right: Tensor  # [R, I]
    squared_norm: float


def resize(delta: Delta, *, rank: int | None, energy: float | None) -> Approximation:
    """Returns the nearest LoRA of at most `rank`, or of the least rank that keeps the share `energy`, or of both.

    A LoRA is never given more rank than it has. Raises ParameterError for a change that depends on the base or is one
    of the bias, too, and for one that is no product without `rank`.
    """
    if why := _more_than_a_matrix(delta):
        raise ParameterError(f"a {delta.title} that {why} cannot be resized: {_BY_EXTRACTION}")
    product = delta.product()
    if product is not None:
        factors = _of_product(product.up.double() * product.scale, product.down.double())
    elif rank is None:
        raise ParameterError(f"a {delta.title} has as many ranks as its layer is wide: give --rank")
    else:
        factors = _of_matrix(delta.dense(), rank)
    return _approximation(factors, rank=rank, energy=energy)


def approximate(change_OI: Tensor, *, rank: int, energy: float | None = None) -> Approximation:
    """Returns the nearest LoRA of at most `rank` to a change of a weight."""
    return _approximation(_of_matrix(change_OI, rank), rank=rank, energy=energy)


def merge(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Delta]:
    """Returns the one adapter that changes the model by the weighted sum of changes, exactly: ranks add up.

    Raises ParameterError where a module is changed by several adapters of a kind whose sum has no such form.
    """
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    merged: dict[str, Delta] = {}
    for path in paths:
        parts = [(adapter[path], weight) for adapter, weight in zip(adapters, weights, strict=True) if path in adapter]
        if len(parts) == 1:
            merged[path] = parts[0][0].scaled(parts[0][1])
        else:
            merged[path] = _sum([_summand(path, delta, weight) for delta, weight in parts])
    return merged


def mean_kept(found: Iterable[Approximation]) -> float:
    """Returns the share of all changes' squared norm that approximations of them hold together."""
    found = list(found)
    total = sum(part.squared_norm for part in found)
    return sum(part.kept * part.squared_norm for part in found) / total if total else 1.0


def _summand(path: str, delta: Delta, weight: float) -> Product:
    product = None if delta.needs_base else delta.scaled(weight).product()
    if product is None:
        by_resizing = "turn it into one with `sd3pipe adapter resize --rank N`"
        raise ParameterError(
            f"{path} is changed by several adapters, one of them a {delta.title}, and only LoRAs add up: "
            f"{_BY_EXTRACTION if _more_than_a_matrix(delta) else by_resizing}"
        )
    return product


def _more_than_a_matrix(delta: Delta) -> str:
    """Returns why a change is no matrix alone, "" where it is one."""
    if delta.needs_base:
        return "depends on the base"
    return "has biases" if delta.bias_change() is not None else ""


def _sum(parts: Sequence[Product]) -> LoRADelta:
    down_RI = torch.cat([part.down.float() for part in parts])
    if len({part.scale for part in parts}) == 1:
        up_OR = torch.cat([part.up.float() for part in parts], dim=1)
        return LoRADelta(down=down_RI, up=up_OR, alpha=parts[0].scale * down_RI.shape[0])
    up_OR = torch.cat([part.up.float() * part.scale for part in parts], dim=1)
    return LoRADelta(down=down_RI, up=up_OR, alpha=float(down_RI.shape[0]))


def _approximation(factors: _Factors, *, rank: int | None, energy: float | None) -> Approximation:
    squared_R = factors.values.double().square()
    chosen = _needed_rank(squared_R, factors.squared_norm, energy)
    chosen = max(1, chosen if rank is None else min(rank, chosen))
    root_R = factors.values[:chosen].sqrt()
    delta = LoRADelta(
        down=(root_R[:, None] * factors.right[:chosen]).float(),
        up=(factors.left[:, :chosen] * root_R).float(),
        alpha=float(chosen),
    )
    kept = float(squared_R[:chosen].sum()) / factors.squared_norm if factors.squared_norm else 1.0
    return Approximation(delta=delta, squared_norm=factors.squared_norm, kept=min(1.0, kept))


def _needed_rank(squared_R: Tensor, squared_norm: float, energy: float | None) -> int:
    """Returns the least rank that keeps the share `energy` of the squared norm; all there is without one."""
    if energy is None or energy >= 1.0:
        return max(1, int((squared_R > squared_norm * 1e-14).sum()))
    shares_R = squared_R.cumsum(0) / max(squared_norm, math.ulp(0.0))
    return min(len(shares_R), 1 + int((shares_R < energy).sum()))


def _of_product(left_OR: Tensor, right_RI: Tensor) -> _Factors:
    """Decomposes a product of thin matrices through the triangular factors of both."""
    left_q, left_r = torch.linalg.qr(left_OR)
    right_q, right_r = torch.linalg.qr(right_RI.T)
    u, values, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return _Factors(left_q @ u, values, vh @ right_q.T, float(values.square().sum()))


def _of_matrix(matrix_OI: Tensor, rank: int | None) -> _Factors:
    """Decomposes a matrix, its first `rank` values and a few more if it is large (Halko et al., arXiv:0909.4061)."""
    squared_norm = float(torch.linalg.vector_norm(matrix_OI.double()).square())
    if min(matrix_OI.shape) <= _EXACT_SIDE or rank is None or 4 * rank > min(matrix_OI.shape):
        u, values, vh = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
        return _Factors(u, values, vh, squared_norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the projection is random, the result reproducible
        u, values, v = torch.svd_lowrank(matrix_OI.float(), q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return _Factors(u, values, v.T, squared_norm)
