"""What embeddings of pictures say: likeness, copying, prompt, drift and variety of each checkpoint, beside the base.

Each score is a table by prompt and seed, and each number in it a difference from the base's picture of the same prompt
and the same noise. Likeness is measured along what sets the training pictures apart from the base's; else, similarity
is the cosine of two embeddings, which are unit vectors.
"""

# C columns: the base, then K checkpoints; P prompts, S seeds, D embedding width, N training pictures, M other vectors

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3pipe.judgement import Score, Scores
from sd3pipe.judging.bootstrap import Array, Resampled, resample
from sd3pipe.judging.concept import towards
from sd3pipe.judging.suggestion import Candidate, Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Unit vectors of everything that is compared."""

    drawn_CPSD: Array
    trained_ND: Array  # training pictures
    held_out_MD: Array  # pictures that were never trained on; may be none
    texts_PD: Array | None  # prompts without the trigger word; None where the judge model reads no text
    with_trigger_P: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The resampled scores of the checkpoints; None what cannot be said."""

    likeness: Resampled | None
    likeness_held_out: Resampled | None
    copying: Resampled | None
    margin: Resampled | None  # of copying, not as a difference from the base
    prompt: Resampled | None
    drift: Resampled | None
    variety: Resampled | None
    scales: dict[str, float]  # how much of prompt, drift and variety there is in the base to be lost
    chaos: float  # of the base's variety, what it has only where it does not understand the trigger: no loss


def measure(embedded: Embedded) -> Measured:
    """Returns the scores of all checkpoints."""
    drawn_CPSD, trigger_P = embedded.drawn_CPSD, embedded.with_trigger_P
    bearing_CPSD, neutral_CPSD = drawn_CPSD[:, trigger_P], drawn_CPSD[:, ~trigger_P]
    has_bearing, has_neutral = bool(trigger_P.any()), not trigger_P.all()
    margins_CPS = nearness(bearing_CPSD, embedded.trained_ND) if has_bearing else None
    prompts_CPS = None if embedded.texts_PD is None else adherence(drawn_CPSD, embedded.texts_PD)
    return Measured(
        likeness=_likeness(bearing_CPSD, embedded.trained_ND),
        likeness_held_out=_likeness(bearing_CPSD, embedded.held_out_MD),
        copying=None if margins_CPS is None else _from_base(margins_CPS),
        margin=None if margins_CPS is None else resample(margins_CPS[1:]),
        prompt=None if prompts_CPS is None else _from_base(prompts_CPS),
        drift=resample(1 - _cosine(neutral_CPSD[1:], neutral_CPSD[:1])) if has_neutral else None,
        variety=_from_base(variety(_varied(embedded))) if drawn_CPSD.shape[2] > 1 else None,
        scales=_scales(embedded),
        chaos=_chaos(embedded),
    )


def nearness(drawn_CPSD: Array, trained_ND: Array) -> Array:
    """Returns by how much each drawn picture is nearer to one training picture than that is to any other of them.

    A single training picture has no other, so the base's drawings of different prompts stand in: a picture that is
    nearer to it than those are to one another is near.
    """
    similarities_CPSN = drawn_CPSD @ trained_ND.T
    among_NN = trained_ND @ trained_ND.T
    np.fill_diagonal(among_NN, -np.inf)
    nearest_N = among_NN.max(axis=1)
    if len(trained_ND) == 1:
        nearest_N = np.array([_between_prompts(drawn_CPSD[0])])
    return (similarities_CPSN - nearest_N).max(axis=-1)


def adherence(drawn_CPSD: Array, texts_PD: Array) -> Array:
    """Returns each drawn picture's similarity to its prompt's text."""
    return np.einsum("cpsd,pd->cps", drawn_CPSD, texts_PD)


def variety(drawn_CPSD: Array) -> Array:
    """Returns how unlike the pictures of one prompt are over seeds, as numbers whose mean is their mean distance.

    A seed takes part in every pair with another, so its number counts twice what it differs from the prompt's mean:
    then resampling seeds gives the spread of the mean over pairs (the first-order term of a U-statistic).
    """
    seeds = drawn_CPSD.shape[2]
    similarity_CPSS = drawn_CPSD @ drawn_CPSD.swapaxes(-1, -2)
    unlike_CPS = 1 - (similarity_CPSS.sum(axis=-1) - np.einsum("cpss->cps", similarity_CPSS)) / (seeds - 1)
    return 2 * unlike_CPS - unlike_CPS.mean(axis=2, keepdims=True)


def losses(measured: Measured, tolerance: float) -> dict[str, Loss]:
    """Returns what each checkpoint loses, and the limit: the tolerated share of what the base has.

    A word that the base does not know it draws as anything, and learning it ends that: only of the variety that the
    base has where it understands a share is a loss.
    """
    lost = {
        "prompt": _negative(measured.prompt),
        "drift": measured.drift,
        "variety": _negative(measured.variety),
    }
    return {
        name: Loss(
            lost=resampled, limit=tolerance * measured.scales[name] + (measured.chaos if name == "variety" else 0.0)
        )
        for name, resampled in lost.items()
        if resampled is not None and name in measured.scales
    }


def as_scores(candidates: Sequence[Candidate], measured: Measured, tolerance: float) -> tuple[Scores, ...]:
    """Returns the scores as judge.json has them. What is claimed holds for all checkpoints at once."""
    limit = tolerance * measured.scales.get("drift", np.inf)
    close = [] if measured.margin is None else measured.margin.family()
    drifts = [] if measured.drift is None else measured.drift.family()

    def score(resampled: Resampled | None, number: int) -> Score | None:
        return None if resampled is None else resampled.score(number)

    return tuple(
        Scores(
            checkpoint=candidate.checkpoint,
            multiplier=candidate.multiplier,
            likeness=score(measured.likeness, number),
            likeness_held_out=score(measured.likeness_held_out, number),
            copying=score(measured.copying, number),
            prompt=score(measured.prompt, number),
            drift=score(measured.drift, number),
            variety=score(measured.variety, number),
            close=_above(close, number, 0.0),
            drifts=_above(drifts, number, limit),
        )
        for number, candidate in enumerate(candidates)
    )


def _above(family: Sequence[Score], number: int, limit: float) -> bool:
    low = family[number].low if family else None
    return low is not None and low > limit


def _likeness(bearing_CPSD: Array, pictures_ND: Array) -> Resampled | None:
    """Returns how far checkpoints have come towards a set of pictures; None where nothing tells that."""
    if not bearing_CPSD.shape[1] or not len(pictures_ND):
        return None
    come_KPS = towards(bearing_CPSD, pictures_ND)
    return None if come_KPS is None else resample(come_KPS)


def _from_base(scores_CPS: Array) -> Resampled:
    return resample(scores_CPS[1:] - scores_CPS[:1])


def _negative(resampled: Resampled | None) -> Resampled | None:
    return None if resampled is None else resampled.combined(-np.eye(len(resampled.values_K)))


def _cosine(first: Array, second: Array) -> Array:
    return (first * second).sum(axis=-1)


def _scales(embedded: Embedded) -> dict[str, float]:
    """Returns, of the base: how much more a picture is like its own prompt than like others, how unlike pictures of
    different prompts are, how unlike those of different seeds."""
    base_PSD, prompts = embedded.drawn_CPSD[0], embedded.drawn_CPSD.shape[1]
    scales: dict[str, float] = {}
    if prompts > 1:
        scales["drift"] = 1 - _between_prompts(base_PSD)
        if embedded.texts_PD is not None:
            similarity_PSM = base_PSD @ embedded.texts_PD.T
            own_PS = np.einsum("psp->ps", similarity_PSM)
            others_PS = (similarity_PSM.sum(axis=-1) - own_PS) / (prompts - 1)
            scales["prompt"] = max(0.0, float((own_PS - others_PS).mean()))
    if base_PSD.shape[1] > 1:
        scales["variety"] = float(variety(_varied(embedded)[:1]).mean()) - _chaos(embedded)
    return scales


def _varied(embedded: Embedded) -> Array:
    """Returns the pictures whose variety counts: of prompts with the trigger, where there are any."""
    trigger_P = embedded.with_trigger_P
    return embedded.drawn_CPSD[:, trigger_P] if trigger_P.any() else embedded.drawn_CPSD


def _chaos(embedded: Embedded) -> float:
    """Returns by how much more the base varies with the trigger than without, 0 for less."""
    base_1PSD, trigger_P = embedded.drawn_CPSD[:1], embedded.with_trigger_P
    if trigger_P.all() or not trigger_P.any() or base_1PSD.shape[2] < 2:
        return 0.0
    return max(0.0, float(variety(base_1PSD[:, trigger_P]).mean() - variety(base_1PSD[:, ~trigger_P]).mean()))


def _between_prompts(base_PSD: Array) -> float:
    """Returns the mean similarity of pictures of different prompts on the same noise; 0 where there is one prompt."""
    prompts = len(base_PSD)
    similarity_PPS = np.einsum("psd,qsd->pqs", base_PSD, base_PSD)
    apart_PP = ~np.eye(prompts, dtype=bool)
    return float(similarity_PPS[apart_PP].mean()) if prompts > 1 else 0.0
