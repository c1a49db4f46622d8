"""Unites caches that were encoded on several machines into one, without encoding anything."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.keys import Kind
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.samples import COLUMNS, row_columns
from sd3pipe.cache.segment import read_header
from sd3pipe.cache.store import FillCounts, fill_cache
from sd3pipe.cache.wanted import MOST_TAGS, Wanted
from sd3pipe.errors import InputError

_SAME = ("kind", "recipe", "recipe_version", "fingerprints", "extra")
_PLACE = ("subset", "name", "crop", "flip", "variant", "bucket_h", "bucket_w")  # what names a sample in a dataset


def merge_caches(caches: Sequence[Path], out: Path) -> FillCounts:
    """Makes `out` the cache of all samples that any of the caches has. Returns the counts.

    Raises InputError for caches that were made from other weights or by another recipe, that disagree on a sample or a
    subset, or that are damaged; also if `out` is a cache that holds anything else, unless it is one of them.
    """
    readers = [CacheReader(cache) for cache in caches]
    first = readers[0]
    for other, name in itertools.product(readers[1:], _SAME):
        mine, theirs = getattr(first.manifest, name), getattr(other.manifest, name)
        if mine != theirs:
            raise InputError(
                f"{first.where} and {other.where} differ in {_first_difference(name, mine, theirs)}: "
                "only caches of equal recipe and weights can be united"
            )
    wanted = united(readers, caches)
    is_there = CacheFolder(out).manifest.exists() and out.resolve() not in {cache.resolve() for cache in caches}
    if is_there and not _content(CacheReader(out)) <= _content(*readers):
        raise InputError(
            f"{out} is a cache already, of other rows: name it among the caches to unite, or choose another --out"
        )
    return fill_cache(out, wanted, _cannot_encode, made_with="", others=caches)


def united(readers: Sequence[CacheReader], caches: Sequence[Path]) -> Wanted:
    """Returns the content of all caches together."""
    first = readers[0].manifest
    rows = _rows(readers, caches)
    numbers = {key: number for number, key in enumerate(rows)}
    samples = _united_samples(first.kind, readers)
    named = set(zip(samples.get("subset", samples["name"]), samples["name"], strict=True))
    unreadable: list[Mapping[str, Any]] = []
    for entry in (entry for reader in readers for entry in reader.manifest.quarantined):
        if entry not in unreadable and (entry.get("subset", entry["name"]), entry["name"]) not in named:
            unreadable.append(entry)
    for name in row_columns(first.kind):
        samples[name] = [numbers[key] for key in samples[name]]
    return Wanted(
        kind=first.kind,
        recipe_version=first.recipe_version,
        fingerprints=first.fingerprints,
        recipe=first.recipe,
        rows=list(rows.values()),
        samples=samples,
        subsets=_united_subsets(readers),
        unreadable=unreadable,
        named_rows={name: numbers[str(key)] for name, key in first.extra.items() if key in numbers},
        tags=_united_tags(readers),
    )


def _content(*readers: CacheReader) -> set[str]:
    """Returns what caches hold together: how their rows were made, and each sample."""
    made = {repr([getattr(reader.manifest, name) for name in _SAME]) for reader in readers}
    samples = (zip(*reader.samples.to_columns(reader.keys).values(), strict=True) for reader in readers)
    return made.union(*({repr(line) for line in lines} for lines in samples))


def _first_difference(name: str, mine: Any, theirs: Any) -> str:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                return _first_difference(f"{name}.{key}", mine.get(key), theirs.get(key))
    return f"{name} ({mine} and {theirs})"


def _rows(readers: Sequence[CacheReader], caches: Sequence[Path]) -> dict[str, WantedRow]:
    """Returns the live rows of all caches, from their segments' headers."""
    rows: dict[str, WantedRow] = {}
    for reader, cache in zip(readers, caches, strict=True):
        for plan_id in reader.index.plan_ids():
            path = CacheFolder(cache).find_segment(plan_id)
            if path is None:
                raise InputError(
                    f"{cache} lacks segment {plan_id}: run `sd3pipe cache verify --repair`, then encode again"
                )
            header = read_header(path)
            for info in header.rows:
                recipe = info.ingredients.recipe
                rows[info.key] = WantedRow(source=info.source, recipe=recipe, group=header.group, nbytes=header.nbytes)
    return rows


def _united_samples(kind: Kind, readers: Sequence[CacheReader]) -> dict[str, list[Any]]:
    """Returns the samples of all caches, each once. Raises InputError if two caches disagree on one."""
    names = list(COLUMNS[kind])
    place = [names.index(name) for name in _PLACE if name in names]
    found: dict[tuple[Any, ...], tuple[CacheReader, tuple[Any, ...]]] = {}
    for reader in readers:
        columns = reader.samples.to_columns(reader.keys)
        for line in zip(*(columns[name] for name in names), strict=True):
            known, other = found.setdefault(tuple(line[number] for number in place), (reader, line))
            if other != line:
                raise InputError(
                    f"{known.where} and {reader.where} have different rows for {line[0]}: encode one dataset"
                )
    lines = [line for _, line in found.values()]
    return {name: [line[number] for line in lines] for number, name in enumerate(names)}


def _united_subsets(readers: Sequence[CacheReader]) -> dict[str, Mapping[str, Any]]:
    """Returns the settings of all subsets. Raises InputError if two caches disagree on one."""
    found: dict[str, tuple[CacheReader, Mapping[str, Any]]] = {}
    for reader in readers:
        for name, settings in reader.manifest.subsets.items():
            known, other = found.setdefault(name, (reader, settings))
            if other != settings:
                difference = _first_difference(f"subsets.{name}", other, settings)
                raise InputError(
                    f"{known.where} and {reader.where} differ in {difference}: encode them from one dataset file"
                )
    return {name: settings for name, (_, settings) in found.items()}


def _united_tags(readers: Sequence[CacheReader]) -> dict[str, Mapping[str, int]]:
    """Returns the tags of subsets whose pictures are known to be counted once.

    That is where all caches have the same pictures, and count alike, or no two of them share one. Which captions others
    have counted is not known, nor what was left out of a full list.
    """
    united: dict[str, Mapping[str, int]] = {}
    for name in sorted({name for reader in readers for name in reader.manifest.tags}):
        its = [reader for reader in readers if name in reader.manifest.subsets]
        counted = [tags[name] for reader in its if name in (tags := reader.manifest.tags)]
        names: list[set[str]] = []
        for samples in (reader.samples for reader in its):
            pairs = zip(samples.strings("name").to_list(), samples.strings("subset").to_list(), strict=True)
            names.append({picture for picture, subset in pairs if subset == name})
        if len(counted) < len(its):
            continue
        if all((tags, there) == (counted[0], names[0]) for tags, there in zip(counted, names, strict=True)):
            united[name] = counted[0]
        elif sum(map(len, names)) == len(set().union(*names)) and all(len(tags) < MOST_TAGS for tags in counted):
            total = sum(map(Counter, counted), Counter())
            united[name] = dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS])
    return united


def _cannot_encode(keys: Sequence[str]) -> NoReturn:
    raise InputError(
        f"{len(keys)} rows are damaged or missing in every cache: "
        "run `sd3pipe cache verify --repair` on each, then encode again"
    )
