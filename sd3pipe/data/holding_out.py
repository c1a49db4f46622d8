"""Chooses the pictures that validation holds out: by content, so that files that come later move none of the others."""

from collections import defaultdict
from collections.abc import Iterable

from sd3pipe.data.dataset_file import Subset
from sd3pipe.fingerprint import hash_json


def held_out(pictures: Iterable[tuple[Subset, str]]) -> set[tuple[str, str]]:
    """Returns the name of the subset and the hash of each picture that is not for training.

    Regularisation pictures are for training only, as in sd-scripts. Equal pictures are on one side. A subset keeps at
    least one picture for training unless its share is 1, and where a share is asked of two pictures at least one is
    held out in the dataset: the first that a larger share would take.
    """
    shares: dict[str, float] = {}
    places: dict[str, dict[str, float]] = defaultdict(dict)
    everything: set[str] = set()
    for subset, image_hash in pictures:
        everything.add(image_hash)
        if subset.validation_split > 0 and not subset.is_reg:
            shares[subset.name] = subset.validation_split
            number = int(hash_json(["validation", subset.validation_seed, image_hash])[:13], 16)
            places[subset.name][image_hash] = number / 16**13  # from 0 to 1, by the content
    if len(everything) < 2:
        return set()
    chosen: set[tuple[str, str]] = set()
    for name, place_of in places.items():
        below = {image_hash for image_hash, place in place_of.items() if place < shares[name]}
        if len(below) == len(place_of) and shares[name] < 1:
            below.remove(max(below, key=place_of.__getitem__))
        chosen |= {(name, image_hash) for image_hash in below}
    return chosen or _first(places, shares)


def _first(places: dict[str, dict[str, float]], shares: dict[str, float]) -> set[tuple[str, str]]:
    """Returns the one picture that would be held out first if the shares rose, wherever it lies."""
    of_several = {
        (place / shares[name], image_hash)
        for name, place_of in places.items()
        if len(place_of) > 1
        for image_hash, place in place_of.items()
    }
    if not of_several:
        return set()
    _, first = min(of_several)
    return {(name, first) for name, place_of in places.items() if first in place_of}
