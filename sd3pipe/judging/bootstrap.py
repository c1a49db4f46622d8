"""How sure a mean over prompts and seeds is: a paired bootstrap that draws prompts and seeds with replacement.

Every quantity is a table of numbers by prompt and seed, measured on the same prompts and the same noise as all others,
and one draw of prompts and seeds serves all of them. So what a hard prompt or an odd seed does to all alike cancels in
a difference. Prompts and seeds are crossed, so the noise of single pictures stands in the means of both; the part of
it in the seeds' means is taken out (the usual estimate of variance components), else it would count twice.
"""

# K quantities, C of them combined, P prompts, S seeds, N of either, R resamples

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3pipe.intervals import t_quantile
from sd3pipe.judgement import Score

Array = NDArray[np.float64]

RESAMPLES = 4000
_SEED = 20231026  # any number: equal inputs give equal intervals
_COVERAGE = 0.95
_NORMAL_QUANTILE = 1.96
_ENOUGH = 1000.0  # degrees of freedom from which on an estimated spread is as good as a known one


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Means of K quantities, how far R resamples lie from them, and the degrees of freedom of that spread."""

    values_K: Array
    deviations_RK: Array
    freedoms_K: Array
    draws: int  # pictures that each mean is over
    known: bool  # whether there was more than one prompt or seed to draw from

    def score(self, quantity: int) -> Score:
        """Returns one quantity's mean and interval."""
        value = float(self.values_K[quantity])
        if not self.known:
            return Score(value=value)
        tail = (1 - _COVERAGE) / 2
        widening = t_quantile(self.freedoms_K[quantity]) / _NORMAL_QUANTILE
        low, high = np.quantile(self.deviations_RK[:, quantity], (tail, 1 - tail)) * widening
        return Score(value=value, low=value - float(high), high=value - float(low))

    def combined(self, weights_CK: Array) -> "Resampled":
        """Returns the same of C weighted sums, such as differences; each has the freedom of its poorest part."""
        return Resampled(
            values_K=weights_CK @ self.values_K,
            deviations_RK=self.deviations_RK @ weights_CK.T,
            freedoms_K=np.where(weights_CK != 0, self.freedoms_K, np.inf).min(axis=1),
            draws=self.draws,
            known=self.known,
        )

    def standard_errors(self) -> Array:
        """Returns the standard error of each mean."""
        return self.deviations_RK.std(axis=0)

    def family(self) -> list[Score]:
        """Returns intervals that hold all at once in 95 % of cases: as wide as the largest deviation of all asks for.

        Each deviation counts in units of its own standard error, which is itself only estimated: it is drawn, too.
        """
        errors_K = self.standard_errors()
        if not self.known or not errors_K.any():
            return [Score(value=float(value)) for value in self.values_K]
        units_RK = np.abs(self.deviations_RK) / np.where(errors_K > 0, errors_K, np.inf)
        freedoms_K = np.minimum(self.freedoms_K, _ENOUGH)
        spread_RK = np.random.default_rng(_SEED).chisquare(freedoms_K, units_RK.shape) / freedoms_K
        factor = float(np.quantile((units_RK / np.sqrt(spread_RK)).max(axis=1), _COVERAGE))
        return [
            Score(value=float(value), low=float(value - half), high=float(value + half))
            for value, half in zip(self.values_K, factor * errors_K, strict=True)
        ]


def resample(tables_KPS: Array) -> Resampled:
    """Returns the means over prompts and seeds with their resamples."""
    _, prompts, seeds = tables_KPS.shape
    values_K = tables_KPS.mean(axis=(1, 2))
    by_prompt_KP = tables_KPS.mean(axis=2) - values_K[:, None]
    by_seed_KS = tables_KPS.mean(axis=1) - values_K[:, None]
    rest_KPS = tables_KPS - values_K[:, None, None] - by_prompt_KP[:, :, None] - by_seed_KS[:, None, :]
    by_seed_KS = by_seed_KS * _own_share(by_seed_KS, rest_KPS)[:, None]
    generator = np.random.default_rng(_SEED)
    deviations_RK = _drawn(by_prompt_KP, generator) + _drawn(by_seed_KS, generator)
    return Resampled(
        values_K=values_K,
        deviations_RK=deviations_RK,
        freedoms_K=_freedoms(by_prompt_KP, by_seed_KS),
        draws=prompts * seeds,
        known=max(prompts, seeds) > 1,
    )


def differences(count: int, pairs: Sequence[tuple[int, int]]) -> Array:
    """Returns the weights that make, of `count` quantities, first minus second for each pair."""
    weights_CK = np.zeros((len(pairs), count))
    for row, (first, second) in enumerate(pairs):
        weights_CK[row, first], weights_CK[row, second] = 1, -1
    return weights_CK


def draws_to_tell(resampled: Resampled, quantity: int) -> int | None:
    """Returns about how many pictures it takes until an interval is likely (80 %) to exclude 0; None if it never will.

    The standard error falls with the root of their number, if prompts and seeds grow alike.
    """
    value, error = resampled.values_K[quantity], resampled.standard_errors()[quantity]
    if not resampled.known or value == 0:
        return None
    needed = resampled.draws * ((_NORMAL_QUANTILE + 0.84) * error / value) ** 2  # 0.84: 80 % quantile of the normal
    return max(resampled.draws, int(np.ceil(needed))) if needed < 1e9 else None


def _own_share(by_seed_KS: Array, rest_KPS: Array) -> Array:
    """Returns by what to scale the seeds' means so that they vary as the seeds alone make them.

    With one prompt nothing tells seeds and single pictures apart, and the seeds' means have to stand for both.
    """
    _, prompts, seeds = rest_KPS.shape
    if prompts == 1 or seeds == 1:
        return np.ones(len(by_seed_KS))
    of_seeds_K = prompts * (by_seed_KS**2).sum(axis=1) / (seeds - 1)
    of_pictures_K = (rest_KPS**2).sum(axis=(1, 2)) / ((prompts - 1) * (seeds - 1))
    share_K = 1 - np.divide(of_pictures_K, of_seeds_K, out=np.ones_like(of_seeds_K), where=of_seeds_K > 0)
    return np.sqrt(share_K.clip(0, 1))


def _drawn(effects_KN: Array, generator: np.random.Generator) -> Array:
    """Returns the means [R, K] of effects that are drawn with replacement, at the spread of an unbiased estimate."""
    number = effects_KN.shape[1]
    counts_RN = generator.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    unbiased = np.sqrt(number / max(1, number - 1))
    return unbiased * (counts_RN - 1) @ effects_KN.T / number


def _freedoms(by_prompt_KP: Array, by_seed_KS: Array) -> Array:
    """Returns the degrees of freedom of the sum of both parts' variances (Welch and Satterthwaite)."""
    parts = [
        ((effects**2).sum(axis=1) / freedom / effects.shape[1], freedom)
        for effects in (by_prompt_KP, by_seed_KS)
        if (freedom := effects.shape[1] - 1)
    ]
    total_K = sum(variance_K for variance_K, _ in parts) ** 2
    weighed_K = sum(variance_K**2 / freedom for variance_K, freedom in parts)
    return np.divide(total_K, weighed_K, out=np.full(len(by_prompt_KP), np.inf), where=np.asarray(weighed_K) > 0)
