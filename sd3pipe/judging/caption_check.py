"""Which captions do not belong to their pictures, which change nothing, and what an adapter has learnt of each.

A picture's advantage is how much less its own caption errs than other pictures' captions do on equal noise, as a share
of the error without any caption. Where the picture and its caption belong together it is clearly above 0.
"""

# P pictures, O other captions, N noises, S noise levels, K quantities

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sd3pipe.diffusion.draws import hashes, stream_key
from sd3pipe.judgement import Score
from sd3pipe.judging.bootstrap import Array, Resampled, resample

SUSPECT_SHARE = 0.5  # of the median advantage: below, a caption is nearer to explaining nothing than to the usual
NOTHING_SHARE = 0.05  # of the median by which captions move the prediction: at most so much is "changes nothing"
LOW_NOISE = 0.3  # up to here an error falls by what is remembered of a picture, not by what is understood
_FEW_HELD_OUT = 3


def other_captions(picture: str, own: int, texts: Sequence[int], most: int) -> list[int]:
    """Returns the text rows of other pictures to compare with: a choice that depends on the picture and each text."""
    others = np.array([text for text in texts if text != own], dtype=np.int64)
    order = hashes(others.astype(np.uint64), "other captions", stream_key(picture))
    return others[np.argsort(order, kind="stable")][:most].tolist()


def advantages(own_PN: Array, empty_PN: Array, others_PON: Array) -> Resampled:
    """Returns each picture's advantage, resampled over other captions and noises."""
    scale_P = empty_PN.mean(axis=1)
    return resample((others_PON - own_PN[:, None]) / scale_P[:, None, None])


def suspects(found: Resampled) -> NDArray[np.bool_]:
    """Returns the pictures whose own caption explains them no better than others', all looked at together.

    The whole interval has to lie below half of what captions of these pictures explain in the middle.
    """
    usual = max(0.0, float(np.median(found.values_K)))
    return np.array([score.high is not None and score.high <= SUSPECT_SHARE * usual for score in found.family()])


def change_nothing(moved_PN: Array) -> NDArray[np.bool_]:
    """Returns the pictures whose captions leave the prediction where it is without any, measurably."""
    found = resample(moved_PN[:, None, :])
    usual = float(np.median(found.values_K))
    return np.array([score.high is not None and score.high <= NOTHING_SHARE * usual for score in found.family()])


def gains(base_PN: Array, adapted_PN: Array) -> Resampled:
    """Returns by which share of the base's error each picture's error has fallen under the adapter."""
    return resample(((base_PN - adapted_PN) / base_PN.mean(axis=1, keepdims=True))[:, None, :])


def what_was_learnt(gained: Resampled, low_noise: Resampled, held_out_P: NDArray[np.bool_]) -> list[str]:
    """Returns for each picture whether it was learnt, or at low noise better than any held-out one: memorised."""
    family, low_family = gained.family(), low_noise.family()
    unseen = low_noise.values_K[held_out_P]
    limit = np.inf
    if len(unseen) >= _FEW_HELD_OUT:
        limit = float(unseen.mean() + 2 * unseen.std(ddof=1))
    words = []
    for score, low, held_out in zip(family, low_family, held_out_P, strict=True):
        if score.low is None or score.low <= 0:
            words.append("not learnt")
        elif not held_out and low.low is not None and low.low > max(0.0, limit):
            words.append("memorised")
        else:
            words.append("learnt")
    return words


def gap(gained: Resampled, held_out_P: NDArray[np.bool_]) -> Score | None:
    """Returns by how much trained pictures gained more than held-out ones; None without any of either."""
    if held_out_P.all() or not held_out_P.any():
        return None
    return means(gained, ~held_out_P, held_out_P)


def means(gained: Resampled, first_P: NDArray[np.bool_], second_P: NDArray[np.bool_] | None = None) -> Score:
    """Returns the mean over some pictures, minus that over others."""
    weights_P = first_P / first_P.sum()
    if second_P is not None:
        weights_P = weights_P - second_P / second_P.sum()
    return gained.combined(weights_P[None]).score(0)
