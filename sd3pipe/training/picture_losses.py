"""What the losses of training say of each picture, without a pass more: how hard it is, and what was learnt of it.

A loss depends on its noise level more than on anything else, so it counts as a quantile: where it stands among the
losses of all pictures at about that level. Regularisation pictures whose target is the base's own output stand apart.
"""

# N samples in the order of training, P pictures

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sd3pipe.intervals import mean_and_half_width
from sd3pipe.judgement import Score
from sd3pipe.metrics import read_records
from sd3pipe.picture_losses import PictureLosses, write_picture_losses
from sd3pipe.training.batches import Items, Numbers

Array = NDArray[np.float64]

_AT_ONE_LEVEL = 40  # samples that are compared with one another, at least; more where there are many
_MOST_LEVELS = 50
_FEWEST_VIEWS = 6  # two in each third
_ID_DIGITS = 12


def picture_ids(items: Items) -> list[str]:
    """Returns by what metrics.jsonl calls each picture: content and subset, whatever else is in the dataset."""
    return [f"{number:016x}"[:_ID_DIGITS] for number in items.ids.tolist()]


def summarise_pictures(run: Path, items: Items) -> None:
    """Writes pictures.json from metrics.jsonl, for the pictures that were seen. Raises StorageError."""
    number_of = {name: number for number, name in enumerate(picture_ids(items))}
    samples = [
        (number_of[name], sigma, loss)
        for record in read_records(run)
        if record["kind"] == "step"
        for name, sigma, loss in record.get("samples", ())
        if name in number_of
    ]
    if not samples:
        return
    pictures, sigmas_N, losses_N = (np.array(column) for column in zip(*samples, strict=True))
    apart_N = items.rule("diff_output_preservation")[pictures] > 0
    quantiles_N, excess_N = (np.empty(len(samples)) for _ in range(2))
    for members in (apart_N, ~apart_N):
        if members.any():
            quantiles_N[members], excess_N[members] = at_equal_noise(sigmas_N[members], losses_N[members])
    write_picture_losses(run, list(_summaries(items, pictures, quantiles_N, excess_N)))


def at_equal_noise(sigmas_N: Array, losses_N: Array) -> tuple[Array, Array]:
    """Returns each loss's quantile among those of about its noise level, and the logarithm of loss over usual loss."""
    order = np.argsort(sigmas_N, kind="stable")
    levels = np.array_split(order, max(1, min(_MOST_LEVELS, len(order) // _AT_ONE_LEVEL)))
    logarithms_N = np.log(np.maximum(losses_N, np.finfo(np.float32).tiny))
    middles = [np.median(sigmas_N[level]) for level in levels]
    usual_N = np.interp(sigmas_N, middles, [np.median(logarithms_N[level]) for level in levels])
    excess_N, quantiles_N = logarithms_N - usual_N, np.empty(len(order))
    for level in levels:
        quantiles_N[level[np.argsort(excess_N[level], kind="stable")]] = (np.arange(len(level)) + 0.5) / len(level)
    return quantiles_N, excess_N


def gained(excess_N: Array, looked_at: int) -> tuple[Score, bool]:
    """Returns by which share the losses of one picture fell, and whether they did, one of `looked_at` pictures.

    The first third of its views is compared with the last.
    """
    third = len(excess_N) // 3
    parts = [mean_and_half_width(part.tolist()) for part in (excess_N[:third], excess_N[-third:])]
    fall = parts[0][0] - parts[1][0]
    half = math.hypot(*(half_width or 0.0 for _, half_width in parts))
    for_all = NormalDist().inv_cdf(1 - 0.025 / looked_at) / NormalDist().inv_cdf(0.975)
    value, low, high = (1 - math.exp(-number) for number in (fall, fall - half, fall + half))
    return Score(value=value, low=low, high=high), fall > for_all * half


def _summaries(items: Items, pictures: Numbers, quantiles_N: Array, excess_N: Array) -> Iterator[PictureLosses]:
    order = np.argsort(pictures, kind="stable")
    numbers, starts = np.unique(pictures[order], return_index=True)
    views = np.split(order, starts[1:])
    often = sum(len(view) >= _FEWEST_VIEWS for view in views)
    for number, view in zip(numbers.tolist(), views, strict=True):
        score, learnt = gained(excess_N[view], often) if len(view) >= _FEWEST_VIEWS else (None, None)
        yield PictureLosses(
            name=str(items.names[number]),
            subset=items.rules[int(items.subsets[number])].name,
            seen=len(view),
            quantile=float(quantiles_N[view].mean()),
            gained=score,
            learnt=learnt,
        )
