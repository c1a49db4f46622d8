"""Which checkpoint to take: the earliest that is about as near to the training pictures as any, and loses little."""

# K checkpoints at their strengths, R resamples

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sd3pipe.judgement import Suggestion
from sd3pipe.judging.bootstrap import Array, Resampled, differences, draws_to_tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One checkpoint at one strength, in the order of training."""

    checkpoint: int | str
    multiplier: float

    @property
    def name(self) -> str:
        step = f"step {self.checkpoint}" if isinstance(self.checkpoint, int) else self.checkpoint
        return step if self.multiplier == 1 else f"{step} at strength {self.multiplier:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What the checkpoints lose against the base, in positive numbers, and the most that may be lost."""

    lost: Resampled
    limit: float


def suggest(candidates: Sequence[Candidate], likeness: Resampled, losses: Mapping[str, Loss]) -> Suggestion:
    """Returns the earliest candidate whose likeness is within the interval of the best, among those that lose little.

    Strength 1 comes first; another strength is looked at only where no checkpoint passes at that.
    """
    plain_K = np.array([candidate.multiplier == 1 for candidate in candidates])
    passing_K = _passing(losses, len(candidates))
    told_apart = _told_apart(likeness)
    pool_K = plain_K & passing_K if (plain_K & passing_K).any() else passing_K
    if not pool_K.any():
        return Suggestion(
            checkpoint=None, multiplier=None, sure=None, told_apart=told_apart, draws_needed=None,
            text=_none_passes(candidates, losses),
        )  # fmt: skip
    best = _best(likeness.values_K, pool_K)
    margins_K = _margins(likeness, best)
    chosen = _earliest(likeness.values_K, pool_K, margins_K)
    runner_up = _runner_up(likeness.values_K, pool_K, best)
    needed = None
    if runner_up is not None:
        needed = draws_to_tell(likeness.combined(differences(len(candidates), [(best, runner_up)])), 0)
    sure = _sureness(chosen, likeness, losses, plain_K, margins_K) if likeness.known and told_apart else None
    picked = candidates[chosen]
    return Suggestion(
        checkpoint=picked.checkpoint,
        multiplier=picked.multiplier,
        sure=sure,
        told_apart=told_apart,
        draws_needed=needed,
        text=_text(candidates, chosen, best, sure, told_apart, needed, likeness, bool(plain_K[chosen])),
    )


def _passing(losses: Mapping[str, Loss], count: int) -> NDArray[np.bool_]:
    """Returns which candidates lose no more than may be lost, as far as their means say."""
    within = [loss.lost.values_K <= loss.limit for loss in losses.values()]
    return np.logical_and.reduce([np.ones(count, dtype=bool), *within])


def _told_apart(likeness: Resampled) -> bool:
    """Whether any two candidates differ measurably, all pairs taken together."""
    pairs = list(combinations(range(len(likeness.values_K)), 2))
    family = likeness.combined(differences(len(likeness.values_K), pairs)).family()
    return any(
        score.low is not None and score.high is not None and not score.low <= 0 <= score.high for score in family
    )


def _best(values_K: Array, pool_K: NDArray[np.bool_]) -> int:
    return int(np.argmax(np.where(pool_K, values_K, -np.inf)))


def _runner_up(values_K: Array, pool_K: NDArray[np.bool_], best: int) -> int | None:
    others_K = pool_K & (np.arange(len(values_K)) != best)
    return _best(values_K, others_K) if others_K.any() else None


def _margins(likeness: Resampled, best: int) -> Array:
    """Returns by how much each candidate may fall behind the best one without being measurably behind it."""
    count = len(likeness.values_K)
    family = likeness.combined(differences(count, [(best, other) for other in range(count)])).family()
    return np.array([0.0 if score.low is None else score.value - score.low for score in family])


def _earliest(values_K: Array, pool_K: NDArray[np.bool_], margins_K: Array) -> int:
    within_K = pool_K & (values_K >= values_K[_best(values_K, pool_K)] - margins_K)
    return int(np.argmax(within_K))


def _sureness(
    chosen: int, likeness: Resampled, losses: Mapping[str, Loss], plain_K: NDArray[np.bool_], margins_K: Array
) -> float:
    """Returns in which share of the resamples the same rule chooses the same candidate."""
    passing_RK = np.ones_like(likeness.deviations_RK, dtype=bool)
    for loss in losses.values():
        passing_RK &= loss.lost.values_K + loss.lost.deviations_RK <= loss.limit
    values_RK = likeness.values_K + likeness.deviations_RK
    same = 0
    for values_K, passing_K in zip(values_RK, passing_RK, strict=True):
        pool_K = plain_K & passing_K if (plain_K & passing_K).any() else passing_K
        same += bool(pool_K.any()) and _earliest(values_K, pool_K, margins_K) == chosen
    return same / len(values_RK)


def _text(
    candidates: Sequence[Candidate],
    chosen: int,
    best: int,
    sure: float | None,
    told_apart: bool,
    needed: int | None,
    likeness: Resampled,
    plain: bool,
) -> str:
    """Returns the suggestion in two sentences."""
    name = candidates[chosen].name
    why = (
        "the nearest to the training pictures"
        if chosen == best
        else f"the earliest that is measurably no further from the training pictures than {candidates[best].name}"
    )
    among = "of those that keep" if plain else "as none at strength 1 keeps, of those that keep"
    first = f"Suggested: {name}, {why} {among} prompts, other subjects and variety."
    gained = likeness.score(chosen)
    if gained.low is not None and gained.low <= 0:
        return f"{first} It is not measurably nearer to them than the base: the evidence is weak."
    if not likeness.known:
        return f"{first} One picture tells nothing of how sure that is: draw more seeds or prompts."
    if not told_apart:
        more = f"; about {needed:,} pictures of each would" if needed else ""
        return f"{first} The {likeness.draws} pictures of each do not tell the checkpoints apart{more}."
    assert sure is not None, "told apart by resamples"
    return f"{first} {sure:.0%} of resampled draws suggest the same."


def _none_passes(candidates: Sequence[Candidate], losses: Mapping[str, Loss]) -> str:
    worst = {
        name: int(np.argmin(loss.lost.values_K))
        for name, loss in losses.items()
        if (loss.lost.values_K > loss.limit).all()
    }
    said = "; ".join(
        f"least {name} is lost by {candidates[i].name}, {losses[name].lost.values_K[i]:.3g} where "
        f"{losses[name].limit:.3g} is the limit"
        for name, i in worst.items()
    )
    return (
        f"Nothing is suggested: each checkpoint loses more than --tolerance allows{': ' + said if said else ''}. "
        "Train for fewer steps or at a lower rate, judge lower strengths with --multiplier, or raise --tolerance."
    )
