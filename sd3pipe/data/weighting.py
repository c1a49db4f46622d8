"""How often each sample counts in an epoch, from the subsets' weighting and the samples alone."""

from collections.abc import Mapping, Sequence
from typing import Any


def sample_repeats(subsets: Mapping[str, Mapping[str, Any]], sample_subsets: Sequence[str]) -> list[int]:
    """Returns the number of times each training sample is seen per epoch; 0 for unused regularisation pictures.

    `subsets` holds per subset `dataset`, `num_repeats` and `is_reg`, as the manifest does; `sample_subsets` names the
    subset of each sample (of one crop and flip), in order. As in sd-scripts, regularisation pictures of a dataset are
    gone through in order, again and again, until they are as many as its other pictures with their repeats.
    """
    repeats = [0 if subsets[name]["is_reg"] else int(subsets[name]["num_repeats"]) for name in sample_subsets]
    datasets = [subsets[name].get("dataset", 0) for name in sample_subsets]
    for dataset in dict.fromkeys(datasets):
        members = [number for number, other in enumerate(datasets) if other == dataset]
        wanted = sum(repeats[number] for number in members)
        regular = [number for number in members if subsets[sample_subsets[number]]["is_reg"]]
        first_round = [int(subsets[sample_subsets[number]]["num_repeats"]) for number in regular]
        for number, times in zip(regular, _cycled(first_round, wanted), strict=True):
            repeats[number] = times
    return repeats


def _cycled(first_round: Sequence[int], wanted: int) -> list[int]:
    """Returns repeats that add up to `wanted` or just above: the first round as given, then one each per round."""
    times = [0] * len(first_round)
    total = 0
    for number, repeats in enumerate(first_round):
        if total >= wanted:
            return times
        times[number] = repeats
        total += repeats
    if not times or total >= wanted:
        return times
    rounds, rest = divmod(wanted - total, len(times))
    return [count + rounds + (number < rest) for number, count in enumerate(times)]
