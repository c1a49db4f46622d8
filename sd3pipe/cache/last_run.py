"""What an encode stage last wanted and found, noted machine-locally beside its cache.

So `cache why` can say what a row would need, and a run that would find the same has nothing to do.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, NonNegativeInt, TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.keys import Ingredients, Kind
from sd3pipe.cache.samples import check_columns
from sd3pipe.cache.wanted import Wanted
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.files import write_bytes, write_json
from sd3pipe.watched import Watched

_RUN = "last_run.json"
_WANTED = "wanted-"  # and the identity of what was wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRun:
    """What a run found, with hashes of all that it went by.

    `state` is that of the dataset's file and folders, `published` the manifest's hash, `recipe` stands for the rest.

    `said` is what was logged of the dataset, by level.
    """

    format: Literal[1] = 1
    dataset: str
    watched: list[Watched]
    state: str
    recipe: str
    wanted: str  # identity of what the run wanted
    published: str
    rows: NonNegativeInt
    failed: NonNegativeInt
    quarantined: NonNegativeInt
    facts: dict[str, JsonValue]  # of the report
    remark: str  # the end of the summary
    said: list[tuple[int, str]]

    def write(self, cache: Path) -> None:
        """Notes it beside a cache. Raises StorageError."""
        write_json(CacheFolder(cache).machine / _RUN, asdict(self))


def last_run(cache: Path) -> LastRun | None:
    """Returns what was noted beside a cache, None where nothing was or it is damaged."""
    try:
        return read_json(CacheFolder(cache).machine / _RUN, TypeAdapter(LastRun), most_bytes=MOST_LIST_BYTES)
    except DocumentError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWanted:
    """What was wanted: samples, and for each key its source and ingredients."""

    samples: Mapping[str, Sequence[Any]]
    rows: Mapping[str, tuple[str, Ingredients]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What was wanted, in a file; each row has its source and the number of its recipe."""

    kind: Kind
    recipe_version: int
    fingerprints: dict[str, str]
    recipes: list[dict[str, JsonValue]]
    rows: dict[str, tuple[str, NonNegativeInt]]
    samples: dict[str, list[str | int]]


def note_wanted(folder: CacheFolder, wanted: Wanted) -> None:
    """Writes what is wanted beside the cache, unless it is noted already. Raises StorageError."""
    file = folder.machine / f"{_WANTED}{wanted.identity}.json"
    if file.exists():
        return
    recipes, numbers = [], {}
    for row in wanted.rows:
        if id(row.recipe) not in numbers:
            numbers[id(row.recipe)] = len(recipes)
            recipes.append(dict(row.recipe))
    note = {
        "kind": wanted.kind,
        "recipe_version": wanted.recipe_version,
        "fingerprints": dict(wanted.fingerprints),
        "recipes": recipes,
        "rows": {key: [row.source, numbers[id(row.recipe)]] for key, row in wanted.row_by_key.items()},
        "samples": {name: list(values) for name, values in wanted.columns.items()},
    }
    write_bytes(file, json.dumps(note, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    for other in folder.machine.glob(f"{_WANTED}*.json"):
        if other != file:
            other.unlink(missing_ok=True)


def is_noted(folder: CacheFolder, identity: str) -> bool:
    """Whether what was wanted last is what has an identity."""
    return (folder.machine / f"{_WANTED}{identity}.json").exists()


def last_wanted(cache: Path) -> LastWanted | None:
    """Returns what an encode stage on this machine last wanted in a cache; None if that is not known."""
    for file in CacheFolder(cache).machine.glob(f"{_WANTED}*.json"):
        with contextlib.suppress(DocumentError, ValueError, IndexError):  # damaged, or its parts do not fit each other
            note = read_json(file, TypeAdapter(_Note), most_bytes=MOST_LIST_BYTES)
            check_columns(note.kind, note.samples)
            made_from = [
                Ingredients(recipe=recipe, recipe_version=note.recipe_version, fingerprints=note.fingerprints)
                for recipe in note.recipes
            ]
            rows = {key: (source, made_from[number]) for key, (source, number) in note.rows.items()}
            return LastWanted(samples=note.samples, rows=rows)
    return None
