"""Near-duplicates and blur from the pictures alone: a few bytes of each, kept by content, are enough to tell both.

A near-duplicate has nearly the same perceptual hash (pHash: which of the low frequencies of a small grey picture lie
above their median) and nearly the same colours, as it is or mirrored. Thresholds are measured on photographs, see
docs/datasets.md. The hash is written out here since the libraries for it bring scipy and PyWavelets, 40 MB, for one
cosine transform; tests hold it against theirs, bit for bit, and the blur against scikit-image's.
"""

# H W pixels, C channels, N pictures

import contextlib
import functools
import io
import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe import stopping
from sd3pipe.console import count, listed, one_line, progress
from sd3pipe.cores import usable_cores
from sd3pipe.data.places import read_unchanged
from sd3pipe.data.scan import Picture
from sd3pipe.documents import DocumentError, read_data
from sd3pipe.errors import StorageError, UnreadablePicture
from sd3pipe.files import write_bytes

log = logging.getLogger(__name__)

_VERSION = 2  # counts changes of what is kept of a picture
_MOST_BYTES = 1 << 30
_LOOKED_PX = 512  # longest side at which a picture is looked at: about what a bucket makes of it
_HASH_PX, _HASH_SIDE = 64, 16  # of the hash: the 16 x 16 lowest frequencies of 64 x 64 pixels
_COLOURS_SIDE = 4  # of the grid of mean colours
_ALIKE_BITS, _ALIKE_LEVELS = 72, 32  # bits of 256, and levels of 255 anywhere in the grid, that may differ
_BLURRED = 0.6
_TILES_SIDE = 4  # of the grid in which the sharpest part is looked for
_LEAST_EDGE = 0.5  # of 255 levels, on average over a part, to say anything of it
_WIDE_PX = 11  # of the blur that takes from sharp edges
_ROWS = 128  # pictures that are compared with all others at once
_NOT_ALIKE = 257
_DAMAGE = (DocumentError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen of a picture; `like` is the hash of the picture that looks most like it, if any does."""

    decoded: bool
    blurred: bool
    like: str | None
    mirrored: bool


class Looks:
    """What the pictures that were last looked at look like, in a file by their content."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._table = _read(file)

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Returns one picture of each content that was not looked at; those behind an address are left alone."""
        known = set(_hashes(self._table))
        near = (picture for picture in pictures if isinstance(picture.place.file, Path))
        return list({picture.image_hash: picture for picture in near if picture.image_hash not in known}.values())

    def look_at(self, pictures: Sequence[Picture], *, keep: bool = True, quiet: bool = False) -> None:
        """Looks at those that are new; knows these pictures and no others then, and with `keep` the next run, too."""
        new = self.missing(pictures)
        wanted = {picture.image_hash for picture in pictures}
        still = np.array([digest in wanted for digest in _hashes(self._table)], bool)
        if not new and still.all():
            return
        bar = contextlib.nullcontext() if quiet else progress("near-duplicates", len(new), "pictures")
        with ThreadPoolExecutor(usable_cores()) as pool, bar as shown:
            rows = []
            for row in pool.map(_row, new):
                stopping.check()
                rows.append(row)
                if shown:
                    shown.advance()
        self._table = _joined(self._table, still, rows)
        if not keep:
            return
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, version=np.int64(_VERSION), **self._table)
        try:
            write_bytes(self._file, buffer.getvalue())
        except StorageError as error:
            log.warning("what pictures look like is not remembered for the next run: %s", error)

    def seen(self) -> Mapping[str, Seen]:
        """Returns what is known, by the hash of a picture's bytes."""
        hashes, table = _hashes(self._table), self._table
        about = zip(hashes, table["blur"], table["nearest"], table["flipped"], strict=True)
        return {
            digest: Seen(
                decoded=not np.isnan(blur),
                blurred=is_blurred({"blur": blur}),
                like=hashes[near] if near >= 0 else None,
                mirrored=bool(mirrored),
            )
            for digest, blur, near, mirrored in about
        }


def look_warnings(pictures: Sequence[Picture], seen: Mapping[str, Seen]) -> Iterator[str]:
    """Yields what to know about pictures as a whole."""
    names = {picture.image_hash: one_line(picture.name) for picture in pictures}
    damaged = [names[digest] for digest, its in seen.items() if digest in names and not its.decoded]
    if damaged:
        yield f"{count(len(damaged), 'picture')} left out, which cannot be decoded: {listed(sorted(damaged))}"
    pairs = {
        (*sorted((names[digest], names[its.like])), its.mirrored)
        for digest, its in seen.items()
        if digest in names and its.like in names
    }
    if pairs:
        alike = len({name for pair in pairs for name in pair[:2]})
        shown = [f"{one} = {other}{' mirrored' * mirrored}" for one, other, mirrored in sorted(pairs)]
        yield f"{count(alike, 'picture')} nearly the same as another: {listed(shown)}"
    blurred = [names[digest] for digest, its in seen.items() if digest in names and its.blurred]
    if blurred:
        yield f"{count(len(blurred), 'picture')} blurred everywhere: {listed(sorted(blurred))}"


_Table = dict[str, np.ndarray]  # columns over pictures, see _EMPTY
_EMPTY: _Table = {
    "hash": np.empty((0, 32), np.uint8),
    "bits": np.empty((0, 4), np.uint64),
    "mirrored": np.empty((0, 4), np.uint64),
    "colours": np.empty((0, _COLOURS_SIDE, _COLOURS_SIDE, 3), np.uint8),
    "blur": np.empty(0, np.float32),  # NaN where the picture cannot be decoded
    "nearest": np.empty(0, np.int32),  # row of the picture that looks most like it; -1 where none does
    "distance": np.empty(0, np.int16),  # to that, in bits
    "flipped": np.empty(0, bool),  # whether its mirror image is meant
}


def _row(picture: Picture) -> _Table:
    """Returns a table of one picture. One that cannot be decoded looks like no other; whoever encodes it says why."""
    from sd3pipe.data.images import decode_on_white  # imports Pillow, which a second look does not need

    digest = np.frombuffer(bytes.fromhex(picture.image_hash), np.uint8)
    try:
        data = read_unchanged(picture.place, picture.image_hash, while_it="it was looked at")
        look = look_of(decode_on_white(data, picture.place.suffix, has_alpha=picture.has_alpha, at_least_px=_LOOKED_PX))
    except UnreadablePicture:
        bits = digest.view(np.uint64)  # as good as random
        side = _COLOURS_SIDE
        look = {
            "bits": bits,
            "mirrored": bits,
            "colours": np.zeros((side, side, 3), np.uint8),
            "blur": np.float32(np.nan),
        }
    return {"hash": digest[None], **{name: look[name][None] for name in ("bits", "mirrored", "colours", "blur")}}


def look_of(pixels_HWC: np.ndarray) -> _Table:
    """Returns what is kept of a picture, uint8 [H, W, 3]."""
    from PIL import Image

    image = Image.fromarray(pixels_HWC)
    image.thumbnail((_LOOKED_PX, _LOOKED_PX), Image.Resampling.BOX)
    grey = image.convert("L")
    levels_HW = np.asarray(grey.resize((_HASH_PX, _HASH_PX), Image.Resampling.LANCZOS), np.float64)
    frequencies = _cosines() @ levels_HW @ _cosines().T
    signs = (-1.0) ** np.arange(_HASH_SIDE)  # a mirror image has the odd frequencies of its rows the other way round
    colours = image.resize((_COLOURS_SIDE, _COLOURS_SIDE), Image.Resampling.BOX)
    return {
        "bits": _bits(frequencies),
        "mirrored": _bits(frequencies * signs),
        "colours": np.asarray(colours),
        "blur": np.asarray(blur_of(np.asarray(image)), np.float32),
    }


@functools.cache
def _cosines() -> np.ndarray:
    """Returns the lowest rows of the cosine transform (DCT-II) as [frequencies, pixels]."""
    places, frequencies = np.arange(_HASH_PX), np.arange(_HASH_SIDE)[:, None]
    return np.cos(np.pi * (places + 0.5) * frequencies / _HASH_PX)


def _bits(frequencies: np.ndarray) -> np.ndarray:
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)


def is_blurred(look: Mapping[str, Any]) -> bool:
    """Whether what is kept of a picture says that nothing in it is sharp."""
    return bool(look["blur"] > _BLURRED)


def blur_of(pixels_HWC: np.ndarray) -> float:
    """Returns how blurred the sharpest part of a picture is, from 0 to 1; 1 where nothing in it has an edge.

    By what a further blur takes from its edges: Crete, Dolmiere, Ladret, Nicolas, The blur effect (2007). In parts,
    since a portrait before a blurred ground is sharp. Nothing is told of pictures that are too small for parts.
    """
    if min(pixels_HWC.shape[:2]) <= _TILES_SIDE * 2 * _WIDE_PX:
        return 0.0
    richest = pixels_HWC[::4, ::4].std(axis=(0, 1)).argmax()  # red on green may be even in grey
    levels_HW = pixels_HWC[..., richest].astype(np.float32)
    shares = []  # of each part's edges that a blur leaves, along rows and columns together
    for rows_HW in np.array_split(levels_HW, _TILES_SIDE):
        for part_HW in np.array_split(rows_HW, _TILES_SIDE, axis=1):
            (across, left_across), (down, left_down) = edges_left(part_HW), edges_left(part_HW.T)
            if across + down >= _LEAST_EDGE * part_HW.size:
                shares.append((left_across + left_down) / (across + down))
    return min(shares, default=1.0)


def edges_left(levels_HW: np.ndarray) -> tuple[float, float]:
    """Returns the sum of a picture's edges along rows, and what a blur along rows leaves of it."""
    sums = np.cumsum(levels_HW, axis=1)
    smooth_HW = (sums[:, _WIDE_PX:] - sums[:, :-_WIDE_PX]) / _WIDE_PX
    edges, left = _edges(levels_HW[:, (_WIDE_PX + 1) // 2 : -(_WIDE_PX // 2)]), _edges(smooth_HW)
    return float(edges.sum()), float(np.minimum(edges, left).sum())


def _edges(levels_HW: np.ndarray) -> np.ndarray:
    """Returns Sobel's steps along rows, in levels."""
    steps = levels_HW[:, 2:] - levels_HW[:, :-2]
    return np.abs(steps[:-2] + 2 * steps[1:-1] + steps[2:]) / 8


def _joined(old: _Table, kept: np.ndarray, new: Sequence[_Table]) -> _Table:
    """Returns the kept rows with the new ones behind them, each with its nearest among all."""
    number = int(kept.sum())
    table = {
        name: np.concatenate([old[name][kept], *(row[name] for row in new)])
        for name in ("hash", "bits", "mirrored", "colours", "blur")
    }
    places = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # the last for those without
    table["nearest"] = np.append(places[old["nearest"][kept]], np.full(len(new), -1)).astype(np.int32)
    table["flipped"] = np.append(old["flipped"][kept], np.zeros(len(new), bool))
    distances = np.append(old["distance"][kept], np.full(len(new), _NOT_ALIKE))
    table["distance"] = np.where(table["nearest"] < 0, _NOT_ALIKE, distances).astype(np.int16)
    lost = (old["nearest"][kept] >= 0) & (table["nearest"][:number] < 0)  # their nearest is gone
    find_nearest(table, np.append(np.flatnonzero(lost), np.arange(number, number + len(new))))
    return table


def find_nearest(table: _Table, rows: np.ndarray) -> None:
    """Compares some rows with all, and notes in the table whose nearest that changes.

    What differs much in its mean level differs in its colours, so rows are compared in the order of that, and with
    their neighbours only.
    """
    means = table["colours"].mean(axis=(1, 2, 3), dtype=np.float32)
    order = np.argsort(means, kind="stable")
    rows = rows[np.argsort(means[rows], kind="stable")]
    for start in range(0, len(rows), _ROWS):
        stopping.check()
        block = rows[start : start + _ROWS]
        edges = (means[block[0]] - _ALIKE_LEVELS, means[block[-1]] + _ALIKE_LEVELS)
        others = order[slice(*np.searchsorted(means[order], edges))]
        for flipped in (False, True):
            _note_nearest(table, block, others, flipped)


def _note_nearest(table: _Table, block: np.ndarray, others: np.ndarray, flipped: bool) -> None:
    mine, theirs = table["bits"][block], table["mirrored" if flipped else "bits"][others]
    distances = np.zeros((len(block), len(others)), np.int16)
    for word in range(mine.shape[1]):
        distances += np.bitwise_count(mine[:, None, word] ^ theirs[None, :, word])
    distances[block[:, None] == others] = _NOT_ALIKE
    for number, picture in enumerate(block):
        near = np.flatnonzero(distances[number] <= _ALIKE_BITS)
        colours = table["colours"][others[near]].astype(np.int16)
        colours = colours[:, :, ::-1] if flipped else colours
        apart = np.abs(colours - table["colours"][picture]).mean(axis=3).max(axis=(1, 2)) > _ALIKE_LEVELS
        distances[number, near[apart]] = _NOT_ALIKE
    distances[distances > _ALIKE_BITS] = _NOT_ALIKE
    _keep_better(table, block, others[distances.argmin(axis=1)], distances.min(axis=1), flipped)
    _keep_better(table, others, block[distances.argmin(axis=0)], distances.min(axis=0), flipped)


def _keep_better(table: _Table, rows: np.ndarray, nearest: np.ndarray, distances: np.ndarray, flipped: bool) -> None:
    better = distances < table["distance"][rows]
    table["nearest"][rows[better]] = nearest[better]
    table["distance"][rows[better]] = distances[better]
    table["flipped"][rows[better]] = flipped


def _hashes(table: _Table) -> list[str]:
    return [row.tobytes().hex() for row in table["hash"]]


def _read(file: Path) -> _Table:
    """Returns what was kept; nothing where there is no file, or a damaged one or another version's."""
    try:
        with np.load(io.BytesIO(read_data(file, most_bytes=_MOST_BYTES)), allow_pickle=False) as arrays:
            if arrays["version"] != _VERSION:
                return _EMPTY
            table = {name: arrays[name] for name in _EMPTY}
    except _DAMAGE:
        return _EMPTY
    number = len(table["hash"])
    fits = all(
        table[name].shape == (number, *empty.shape[1:]) and table[name].dtype == empty.dtype
        for name, empty in _EMPTY.items()
    )
    return table if fits and ((table["nearest"] >= -1) & (table["nearest"] < number)).all() else _EMPTY
