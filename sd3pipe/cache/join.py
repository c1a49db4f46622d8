"""Pairs each picture's latents with its texts, and refuses caches that do not belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.samples import hex_list
from sd3pipe.console import count, listed
from sd3pipe.errors import InputError, StaleError

PictureId = tuple[str, str, int]  # image hash, subset, and which one it is among equal pictures of the subset

Readers = tuple[CacheReader, CacheReader]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedSample:
    """One crop of one picture: its rows in both caches."""

    name: str
    subset: str
    image_hash: str
    occurrence: int
    split: str
    bucket_h: int
    bucket_w: int
    crop: int
    row: int  # of the latents
    flipped_row: int | None
    text_rows: tuple[int, ...]  # by caption variant


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedSamples:
    """What train trains on, in an order that depends on the caches' content alone."""

    samples: tuple[JoinedSample, ...]
    unreadable: tuple[str, ...]  # one message for each unreadable picture


def join_samples(latents: CacheReader, text: CacheReader) -> JoinedSamples:
    """Returns the samples of two caches joined on (image hash, subset, n-th occurrence).

    Raises InputError for caches of the wrong kinds, StaleError for a picture that only one of them has, unless the
    other lists it as unreadable.
    """
    _check_kinds(latents, text)
    crops, texts = _crops(latents), _texts(text)
    _refuse_unexplained(set(crops) ^ set(texts), crops, texts, (latents, text))
    samples = tuple(
        replace(crop, text_rows=texts[picture][1])
        for picture, picture_crops in crops.items()
        if picture in texts
        for crop in picture_crops
    )
    return JoinedSamples(samples=samples, unreadable=_unreadable_messages((latents, text)))


def _check_kinds(latents: CacheReader, text: CacheReader) -> None:
    for reader, kind in ((latents, "latents"), (text, "text")):
        if reader.manifest.kind != kind:
            raise InputError(f"{reader.where} is a cache of {reader.manifest.kind}, not of {kind}")


def _pictures(names: list[str], subsets: list[str], hashes: list[str]) -> list[PictureId]:
    """Returns each sample's picture; equal pictures of a subset are counted in the order of their names."""
    numbers: dict[tuple[str, str, str], int] = {}
    counts: dict[tuple[str, str], int] = {}
    pictures = []
    for name, subset, image_hash in zip(names, subsets, hashes, strict=True):
        number = numbers.get((name, subset, image_hash))
        if number is None:
            number = counts.get((image_hash, subset), 0)
            counts[image_hash, subset] = number + 1
            numbers[name, subset, image_hash] = number
        pictures.append((image_hash, subset, number))
    return pictures


def _crops(latents: CacheReader) -> dict[PictureId, list[JoinedSample]]:
    """Returns the crops of each picture, without their texts."""
    table = latents.samples
    names, subsets = table.strings("name").to_list(), table.strings("subset").to_list()
    pictures = _pictures(names, subsets, hex_list(table.hashes("image_hash")))
    numbers = {name: table.numbers(name).tolist() for name in ("bucket_h", "bucket_w", "crop", "flip", "row")}
    splits = table.strings("split").to_list()
    found: dict[PictureId, dict[tuple[int, int, int], JoinedSample]] = {}
    for place, picture in enumerate(pictures):
        geometry = (numbers["bucket_h"][place], numbers["bucket_w"][place], numbers["crop"][place])
        row, crops = numbers["row"][place], found.setdefault(picture, {})
        if numbers["flip"][place] and geometry in crops:
            crops[geometry] = replace(crops[geometry], flipped_row=row)
        else:
            crops[geometry] = JoinedSample(
                name=names[place],
                subset=picture[1],
                image_hash=picture[0],
                occurrence=picture[2],
                split=splits[place],
                bucket_h=geometry[0],
                bucket_w=geometry[1],
                crop=geometry[2],
                row=row,
                flipped_row=None,
                text_rows=(),
            )
    return {picture: list(crops.values()) for picture, crops in found.items()}


def _texts(text: CacheReader) -> dict[PictureId, tuple[str, tuple[int, ...]]]:
    """Returns the name and the text rows, by variant, of each picture."""
    table = text.samples
    names = table.strings("name").to_list()
    pictures = _pictures(names, table.strings("subset").to_list(), hex_list(table.hashes("image_hash")))
    found: dict[PictureId, tuple[str, dict[int, int]]] = {}
    for name, picture, variant, row in zip(
        names, pictures, table.numbers("variant").tolist(), table.numbers("row").tolist(), strict=True
    ):
        found.setdefault(picture, (name, {}))[1][variant] = row
    return {
        picture: (name, tuple(rows[variant] for variant in sorted(rows))) for picture, (name, rows) in found.items()
    }


def _refuse_unexplained(
    one_sided: set[PictureId],
    crops: Mapping[PictureId, list[JoinedSample]],
    texts: Mapping[PictureId, Any],
    readers: Readers,
) -> None:
    """Raises StaleError for pictures that one cache has and the other neither has nor lists as unreadable."""
    latents, text = readers
    lacking: dict[str, list[str]] = {latents.where: [], text.where: []}
    for picture in one_sided:
        other = text if picture in crops else latents
        unreadable = {(entry.get("image_hash"), entry.get("subset")) for entry in other.manifest.quarantined}
        if picture[:2] not in unreadable:
            lacking[other.where].append(crops[picture][0].name if picture in crops else texts[picture][0])
    for where, names in lacking.items():
        if names:
            raise StaleError(
                f"{where} lacks {count(len(names), 'picture')} ({listed(sorted(names))}), which the other cache has: "
                "the two were encoded from different datasets; run both encode stages"
            )


def _unreadable_messages(readers: Readers) -> tuple[str, ...]:
    """Returns one message for each picture that either cache lists as unreadable."""
    reasons = {
        f"{entry.get('subset', '')}/{entry.get('name', '')}": entry["reason"]
        for reader in readers
        for entry in reader.manifest.quarantined
    }
    return tuple(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
