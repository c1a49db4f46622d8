"""Why a row is there or not: field by field against the nearest row."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.keys import Ingredients, text_source
from sd3pipe.cache.last_run import is_noted, last_run, last_wanted
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.segment import RowInfo, read_header
from sd3pipe.cache.staleness import SourceCheck, Sources
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import hash_file

Columns = Mapping[str, Sequence[Any]]  # of samples, by name
State = Literal["hit", "stale", "unused", "quarantined", "miss"]
_SHORTEST_KEY = 8  # of the start of a key
_SOURCES = ("image_hash", "caption_hash")
_GEOMETRY = ("crop", "flip", "variant", "bucket_h", "bucket_w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field in which the row that is wanted and the nearest one differ."""

    field: str
    wanted: Any
    nearest: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What became of one wanted row, or of one row that is not wanted any more (`state` is hit, then)."""

    sample: Mapping[str, Any]
    key: str
    state: State
    where: str  # the segment, for hit, stale and unused; the reason, for quarantined
    nearest: str | None  # key of the nearest row, for a miss
    differences: tuple[Difference, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _Known:
    info: RowInfo
    path: Path


class _Evidence:
    """What is known about a cache. What costs time is read where it is asked for."""

    def __init__(self, cache: Path) -> None:
        self._folder = CacheFolder(cache)
        self._folder.check_exists()
        self._reader = CacheReader(cache) if self._folder.manifest.exists() else None
        run = last_run(cache)  # without another wish since, and without a failure, the samples say it all
        as_published = run is not None and not run.failed and is_noted(self._folder, run.wanted)
        self.last = None if as_published else last_wanted(cache)
        reader = self._reader
        self.live: Columns = {} if reader is None else reader.samples.to_columns(reader.keys)
        self.quarantine = {} if reader is None else reader.manifest.unreadable_rows()  # reason by key

    def segment_of(self, key: str) -> str | None:
        """Returns the name of the live segment that a row is in, if that is there."""
        number = None if self._reader is None else self._reader.index.number(key)
        if self._reader is None or number is None:
            return None
        index = self._reader.index
        path = self._folder.segment(index.plan_ids()[int(index.arrays["row_segment"][number])])
        return path.name if path.exists() else None

    @cached_property
    def rows(self) -> Mapping[str, _Known]:
        """All rows by their keys, unused ones too, of which live ones count first."""
        ids = () if self._reader is None else self._reader.index.plan_ids()
        live, rest = {self._folder.segment(plan_id) for plan_id in ids}, self._folder.segment_ids().values()
        rows: dict[str, _Known] = {}
        for path in [*(path for path in rest if path not in live), *self._folder.unused_segments(), *live]:
            with contextlib.suppress(InputError, OSError):
                rows |= {info.key: _Known(info, path) for info in read_header(path).rows}
        return rows


def explain(cache: Path, subject: str) -> list[Explanation]:
    """Returns one explanation for each row of a picture or caption.

    `subject` is a picture file, a picture's name in the dataset, a caption as it goes into the encoders, or the start
    of a key. Raises InputError if neither the last encode (or its --dry-run) nor the cache knows it.
    """
    evidence = _Evidence(cache)
    digest = hash_file(Path(subject)) if Path(subject).is_file() else None
    caption = text_source(subject)
    chosen = _about(evidence.live, subject, digest, caption)
    if evidence.last is not None:  # what was wanted, and what else the cache has
        wanted = evidence.last.samples
        places = {_place(sample) for sample in _samples(wanted, range(len(wanted["name"])))}
        rest = [sample for sample in chosen if _place(sample) not in places]
        chosen = _about(wanted, subject, digest, caption) + rest
    if not chosen:
        raise InputError(
            f"{cache} and its last encode know no picture, caption or key {subject!r}: "
            "run the encode stage with --dry-run if it is new, then ask again"
        )
    names = {sample["name"] for sample in chosen}
    live_names = evidence.live.get("name", ())
    live_ones = _samples(evidence.live, [n for n, name in enumerate(live_names) if name in names])
    published = {_place(sample): sample for sample in live_ones}
    sources = Sources(cache)
    explained = []
    for sample in chosen:
        live = published.get(_place(sample), sample)
        same = all(sample.get(name) == live.get(name) for name in _SOURCES)
        if not same and _check(live, sources).state == "fresh":  # a dry run looked at another state of the files
            sample = live
        pictures = [other["key"] for other in live_ones if _picture(other) == _picture(sample)]
        explained.append(_explain(sample, digest, evidence, sources, pictures))
    return explained


def _check(sample: Mapping[str, Any], sources: Sources) -> SourceCheck:
    return sources.check_picture(sample["name"], sample.get("image_hash", ""))


def _explain(
    sample: Mapping[str, Any], digest: str | None, evidence: _Evidence, sources: Sources, same_picture: list[str]
) -> Explanation:
    key, changes = sample["key"], _check(sample, sources).changes
    if digest is not None and sample.get("image_hash") not in (None, digest):
        changes = ("the file was changed since the last encode or --dry-run looked at it",)
    state: State = "miss"
    nearest, differences, where = None, (), ""
    if segment := evidence.segment_of(key):
        state, where = ("stale" if changes else "hit"), segment
    elif row := evidence.rows.get(key):
        state, where = "unused", row.path.name
    elif key in evidence.quarantine:
        state, where = "quarantined", evidence.quarantine[key]
    elif evidence.last is not None and key in evidence.last.rows:
        nearest, differences = _nearest(evidence.last.rows[key], evidence.rows, same_picture)
    return Explanation(
        sample=sample,
        key=key,
        state=state,
        where=where,
        nearest=nearest,
        differences=differences,
        note="; ".join(changes),
    )


def _nearest(
    wanted: tuple[str, Ingredients], known: Mapping[str, _Known], same_picture: list[str]
) -> tuple[str | None, tuple[Difference, ...]]:
    """Returns the row that differs in the fewest fields, of equals the one of the same picture or caption."""
    fields = _fields(*wanted)
    flat: dict[int, dict[str, Any]] = {}
    best: tuple[tuple[int, bool, str], tuple[Difference, ...]] | None = None
    for key, row in known.items():
        parts = row.info.ingredients
        theirs = flat.setdefault(id(parts), _fields("", parts)) | {"source": row.info.source}
        differences = tuple(
            Difference(field=name, wanted=fields.get(name), nearest=theirs.get(name))
            for name in sorted({*fields, *theirs})
            if fields.get(name) != theirs.get(name)
        )
        rank = (len(differences), key not in same_picture, key)
        if best is None or rank < best[0]:
            best = rank, differences
    return (best[0][2], best[1]) if best is not None else (None, ())


def _fields(source: str, ingredients: Ingredients) -> dict[str, Any]:
    return {"source": source, **_flat(ingredients.to_json())}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return flat


def _samples(columns: Columns, numbers: Iterable[int]) -> list[dict[str, Any]]:
    return [{name: values[number] for name, values in columns.items()} for number in numbers]


def _about(columns: Columns, subject: str, digest: str | None, caption: str) -> list[dict[str, Any]]:
    """Returns the samples meant by a subject, whose hash as a file is `digest`, and as a caption `caption`.

    It looks at whole columns: a mapping for each of 100,000 samples would take most of the time.
    """

    def where(column: str, fits: Callable[[str], bool]) -> Iterator[int]:
        return (number for number, value in enumerate(columns.get(column, ())) if fits(value))

    if digest is not None:
        path = Path(subject).as_posix()
        found = {*where("image_hash", digest.__eq__), *where("name", lambda name: f"/{path}".endswith(f"/{name}"))}
    else:
        found = {number for column in ("name", "prompt", "image_hash") for number in where(column, subject.__eq__)}
        found.update(where("caption_hash", caption.__eq__))
        found.update(where("key", lambda key: len(subject) >= _SHORTEST_KEY and key.startswith(subject)))
        in_subsets = enumerate(zip(columns.get("subset", ()), columns.get("name", ()), strict=False))
        found.update(number for number, place in in_subsets if "/".join(place) == subject)
    return _samples(columns, sorted(found))


def _picture(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    return sample.get("subset"), sample["name"]


def _place(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_picture(sample), *(sample.get(name) for name in _GEOMETRY))
