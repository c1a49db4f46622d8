"""Which checkpoint to take: the earliest that is shown to be as near to the training pictures as any, and loses little.

As near means: short of what the nearest one has gained by at most a tenth, with the whole interval of the difference.
That an earlier one is not measurably further would be no reason to take it: of few pictures that holds for all of them
(docs/decisions/0019-shown-to-be-as-near.md).
"""

# K checkpoints at their strengths, R resamples

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sd3pipe.judgement import Suggestion
from sd3pipe.judging.bootstrap import Array, Resampled, differences, draws_to_tell

SHORT_OF_BEST = 0.1  # share of what the best one has gained


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
    """Returns the earliest candidate that is shown to be as near as the best, among those that lose little.

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
    chosen = _earliest(likeness.values_K, pool_K, _half_widths(likeness, best))
    runner_up = _runner_up(likeness.values_K, pool_K, best)
    needed = None
    if runner_up is not None:
        needed = draws_to_tell(likeness.combined(differences(len(candidates), [(best, runner_up)])), 0)
    sure = _sureness(chosen, likeness, losses, plain_K) if likeness.known and told_apart else None
    picked = candidates[chosen]
    return Suggestion(
        checkpoint=picked.checkpoint,
        multiplier=picked.multiplier,
        sure=sure,
        told_apart=told_apart,
        draws_needed=needed,
        text=_text(
            candidates,
            chosen,
            best,
            _untold(likeness, pool_K, chosen, best),
            sure,
            needed,
            likeness,
            bool(plain_K[chosen]),
        ),
    )


def _passing(losses: Mapping[str, Loss], count: int) -> NDArray[np.bool_]:
    """Returns which candidates lose no more than may be lost, give or take the standard error of the loss.

    Means alone would turn away half of those that lose just what is allowed, whole intervals few that lose twice that.
    """
    within = [loss.lost.values_K - loss.lost.standard_errors() <= loss.limit for loss in losses.values()]
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


def _half_widths(likeness: Resampled, best: int) -> Array:
    """Returns by how much what each candidate has, above all but a tenth of what the best has, is uncertain."""
    count = len(likeness.values_K)
    beyond = likeness.combined(np.eye(count) - (1 - SHORT_OF_BEST) * np.eye(count)[best])
    scores = [beyond.score(number) for number in range(count)]
    return np.array([np.inf if score.low is None else score.value - score.low for score in scores])


def _earliest(values_K: Array, pool_K: NDArray[np.bool_], half_widths_K: Array) -> int:
    """Returns the first that is shown to be as near as the best, or the best where that is shown of none before it."""
    best = _best(values_K, pool_K)
    shown_K = pool_K & (values_K - (1 - SHORT_OF_BEST) * values_K[best] > half_widths_K)
    shown_K[best] = True
    return int(np.argmax(shown_K))


def _untold(likeness: Resampled, pool_K: NDArray[np.bool_], chosen: int, best: int) -> int | None:
    """Returns the first that passes, is not measurably further than the best and comes before the chosen one."""
    count = len(likeness.values_K)
    further = likeness.combined(differences(count, [(best, other) for other in range(chosen)]))
    lows = [further.score(number).low for number in range(chosen)]
    return next((number for number, low in enumerate(lows) if pool_K[number] and low is not None and low <= 0), None)


def _sureness(chosen: int, likeness: Resampled, losses: Mapping[str, Loss], plain_K: NDArray[np.bool_]) -> float:
    """Returns in which share of the resamples the same rule chooses the same candidate."""
    passing_RK = np.ones_like(likeness.deviations_RK, dtype=bool)
    for loss in losses.values():
        passing_RK &= loss.lost.values_K + loss.lost.deviations_RK - loss.lost.standard_errors() <= loss.limit
    values_RK = likeness.values_K + likeness.deviations_RK
    half_widths_KK = np.array([_half_widths(likeness, best) for best in range(len(likeness.values_K))])
    same = 0
    for values_K, passing_K in zip(values_RK, passing_RK, strict=True):
        pool_K = plain_K & passing_K if (plain_K & passing_K).any() else passing_K
        same += bool(pool_K.any()) and _earliest(values_K, pool_K, half_widths_KK[_best(values_K, pool_K)]) == chosen
    return same / len(values_RK)


def _text(
    candidates: Sequence[Candidate],
    chosen: int,
    best: int,
    untold: int | None,
    sure: float | None,
    needed: int | None,
    likeness: Resampled,
    plain: bool,
) -> str:
    """Returns the suggestion in two sentences."""
    name = candidates[chosen].name
    why = (
        "the nearest to the training pictures"
        if chosen == best
        else f"the earliest that is shown to have come at least {1 - SHORT_OF_BEST:.0%} as near to the training "
        f"pictures as {candidates[best].name},"
    )
    among = "of those that keep" if plain else "as none at strength 1 keeps, of those that keep"
    first = f"Suggested: {name}, {why} {among} prompts, other subjects and variety."
    gained = likeness.score(chosen)
    if gained.low is not None and gained.low <= 0:
        return f"{first} It is not measurably nearer to them than the base: the evidence is weak."
    if not likeness.known:
        return f"{first} One picture tells nothing of how sure that is: draw more seeds or prompts."
    if sure is None:
        more = f"; about {needed:,} pictures of each would" if needed else ""
        return f"{first} The {likeness.draws} pictures of each do not tell the checkpoints apart{more}."
    before = "" if untold is None else f"{candidates[untold].name} may be as near, which is too close to tell; "
    return f"{first} {before[:1].upper()}{before[1:]}{sure:.0%} of resampled draws suggest the same."


def _none_passes(candidates: Sequence[Candidate], losses: Mapping[str, Loss]) -> str:
    worst = {
        name: int(np.argmin(loss.lost.values_K))
        for name, loss in losses.items()
        if not _passing({name: loss}, len(candidates)).any()
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
