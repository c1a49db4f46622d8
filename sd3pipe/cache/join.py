"""Pairs each picture's latents with its texts, and refuses caches that do not belong together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.samples import Samples
from sd3pipe.console import count, listed
from sd3pipe.errors import InputError, StaleError

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLists:
    """Row numbers of every picture, end to end: picture i has rows[starts[i]:starts[i + 1]]."""

    rows: Numbers
    starts: Numbers

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "RowLists":
        """Returns the rows of each picture from one list per picture."""
        starts = np.cumsum([0, *map(len, lists)])
        return cls(rows=np.array([row for rows in lists for row in rows], dtype=np.int64), starts=starts)

    def counts(self, pictures: Numbers) -> Numbers:
        return self.starts[pictures + 1] - self.starts[pictures]

    def pick(self, pictures: Numbers, which: Numbers) -> Numbers:
        """Returns the which-th row of each picture."""
        return self.rows[self.starts[pictures] + which]

    def of_pictures(self, pictures: Numbers) -> "RowLists":
        """Returns the rows of some pictures, in their order."""
        counts = self.counts(pictures)
        starts = np.concatenate([[0], np.cumsum(counts)])
        offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return RowLists(rows=self.rows[np.repeat(self.starts[pictures], counts) + offsets], starts=starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedPictures:
    """What train trains on, picture by picture, in an order that depends on the caches' content alone.

    A picture is known by its bytes, its subset and its number among equal pictures of the subset, in the order of their
    names. `latents` lists its crops and flips, `captions` its caption variants; `sizes` is every bucket's (w, h).
    """

    names: list[str]
    subsets: list[str]
    image_hashes: list[str]
    occurrences: Numbers
    splits: list[str]
    latents: RowLists
    captions: RowLists
    sizes: tuple[tuple[int, int], ...]
    unreadable: tuple[str, ...]  # one message for each unreadable picture

    def __len__(self) -> int:
        return len(self.names)


def join_pictures(latents: CacheReader, text: CacheReader) -> JoinedPictures:
    """Returns the pictures of two caches joined on (image hash, subset, n-th occurrence).

    Raises InputError for caches of the wrong kinds, StaleError for a picture that only one of them has, unless the
    other lists it as unreadable.
    """
    for reader, kind in ((latents, "latents"), (text, "text")):
        if reader.manifest.kind != kind:
            raise InputError(f"{reader.where} is a cache of {reader.manifest.kind}, not of {kind}")
    subsets = {name: code for code, name in enumerate(sorted({*_subset_names(latents), *_subset_names(text)}))}
    ours, theirs = _Table(latents.samples, subsets), _Table(text.samples, subsets)
    _, of_ours, of_theirs = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
    for table, joined, where in ((theirs, of_theirs, latents), (ours, of_ours, text)):
        _refuse_unexplained(table, np.setdiff1d(np.arange(len(table.ids)), joined), where)
    order = np.argsort(of_ours)
    of_ours, of_theirs = of_ours[order], of_theirs[order]
    first = ours.first[of_ours]
    heights, widths = ours.samples.numbers("bucket_h"), ours.samples.numbers("bucket_w")
    crops, flips = ours.samples.numbers("crop"), ours.samples.numbers("flip")
    geometry = _first_places(_records(ours.picture_of, heights, widths, crops))
    latent_rows = ours.row_lists(flips, geometry).of_pictures(of_ours)
    used = np.isin(ours.picture_of, of_ours)
    splits = ours.samples.strings("split").to_list()
    reasons = {
        f"{entry.get('subset', '')}/{entry.get('name', '')}": entry["reason"]
        for entry in (*latents.manifest.quarantined, *text.manifest.quarantined)
    }
    return JoinedPictures(
        names=[ours.names[place] for place in first.tolist()],
        subsets=[ours.subsets[place] for place in first.tolist()],
        image_hashes=[digest.tobytes().hex() for digest in ours.samples.hashes("image_hash")[first]],
        occurrences=ours.occurrences[of_ours],
        splits=[splits[place] for place in first.tolist()],
        latents=latent_rows,
        captions=theirs.row_lists(theirs.samples.numbers("variant")).of_pictures(of_theirs),
        sizes=tuple(sorted(set(zip(widths[used].tolist(), heights[used].tolist(), strict=True)))),
        unreadable=tuple(f"{name}: {reason}" for name, reason in sorted(reasons.items())),
    )


def _subset_names(reader: CacheReader) -> set[str]:
    return set(reader.samples.strings("subset").to_list())


class _Table:
    """The samples of one cache, sorted into pictures in the order in which they first come.

    `ids` has a record for each picture that is the same in both caches; `first` is its first sample, `picture_of` the
    picture of each sample.
    """

    def __init__(self, samples: Samples, subsets: dict[str, int]) -> None:
        self.samples = samples
        self.names, self.subsets = samples.strings("name").to_list(), samples.strings("subset").to_list()
        subset = np.fromiter(map(subsets.__getitem__, self.subsets), np.int32, len(self.subsets))
        codes: dict[str, int] = {}
        name = np.fromiter((codes.setdefault(text, len(codes)) for text in self.names), np.int32, len(self.names))
        hashes = samples.hashes("image_hash")
        places = _first_places(_records(hashes, subset, name))
        self.first, self.picture_of = np.unique(places, return_inverse=True)
        self.occurrences = _counted(_first_places(_records(hashes[self.first], subset[self.first])))
        self.ids = _records(hashes[self.first], subset[self.first], self.occurrences)

    def row_lists(self, *keys: np.ndarray) -> RowLists:
        """Returns the rows of each picture, sorted by keys, the last one first."""
        order = np.lexsort((*keys, self.picture_of))
        starts = np.concatenate([[0], np.cumsum(np.bincount(self.picture_of, minlength=len(self.first)))])
        return RowLists(rows=self.samples.numbers("row")[order].astype(np.int64), starts=starts)


def _records(*columns: np.ndarray) -> np.ndarray:
    """Returns one value for each line of some columns, equal where the lines are equal."""
    count = len(columns[0])
    parts = [column.reshape(count, int(np.prod(column.shape[1:]))) for column in columns]
    data = np.hstack([np.ascontiguousarray(part).view(np.uint8) for part in parts])
    return np.ascontiguousarray(data).view(f"S{data.shape[1]}").reshape(-1)  # all of one length: a NUL is no end


def _first_places(records: np.ndarray) -> Numbers:
    """Returns the place at which each value came first."""
    _, first, inverse = np.unique(records, return_index=True, return_inverse=True)
    return first[inverse]


def _counted(groups: Numbers) -> Numbers:
    """Returns how many equal values came before each one."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    before = np.arange(len(groups)) - np.repeat(starts, sizes)
    counts = np.empty_like(before)
    counts[order] = before
    return counts


def _refuse_unexplained(table: _Table, one_sided: Numbers, other: CacheReader) -> None:
    """Raises StaleError for pictures that one cache has and the other neither has nor lists as unreadable."""
    unreadable = {(entry.get("image_hash"), entry.get("subset")) for entry in other.manifest.quarantined}
    hashes = table.samples.hashes("image_hash")
    places = table.first[one_sided].tolist()
    names = [
        table.names[place]
        for place in places
        if (hashes[place].tobytes().hex(), table.subsets[place]) not in unreadable
    ]
    if names:
        raise StaleError(
            f"{other.where} lacks {count(len(names), 'picture')} ({listed(sorted(names))}), which the other cache has: "
            "the two were encoded from different datasets; run both encode stages"
        )
