"""What an encode stage last wanted, noted machine-locally, so that `cache why` can say what a row would need."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue, NonNegativeInt, TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.keys import Ingredients, Kind
from sd3pipe.cache.samples import check_columns
from sd3pipe.cache.wanted import Wanted
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.files import write_bytes

_PREFIX = "wanted-"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWanted:
    """What was wanted: samples, and for each key its source and ingredients."""

    kind: Kind
    samples: Mapping[str, Sequence[Any]]
    rows: Mapping[str, tuple[str, Ingredients]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """The file; each row has its source and the number of its recipe."""

    kind: Kind
    recipe_version: int
    fingerprints: dict[str, str]
    recipes: list[dict[str, JsonValue]]
    rows: dict[str, tuple[str, NonNegativeInt]]
    samples: dict[str, list[str | int]]


def note_wanted(folder: CacheFolder, wanted: Wanted) -> None:
    """Writes what is wanted beside the cache, unless it is noted already. Raises StorageError."""
    file = folder.machine / f"{_PREFIX}{wanted.identity}.json"
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
    for other in folder.machine.glob(f"{_PREFIX}*.json"):
        if other != file:
            other.unlink(missing_ok=True)


def is_noted(folder: CacheFolder, identity: str) -> bool:
    """Whether what was wanted last is what has an identity."""
    return (folder.machine / f"{_PREFIX}{identity}.json").exists()


def _parsed(note: _Note) -> LastWanted:
    """Returns what a note says. Raises ValueError, IndexError if its parts do not fit each other."""
    check_columns(note.kind, note.samples)
    ingredients = [
        Ingredients(recipe=recipe, recipe_version=note.recipe_version, fingerprints=note.fingerprints)
        for recipe in note.recipes
    ]
    rows = {key: (source, ingredients[number]) for key, (source, number) in note.rows.items()}
    return LastWanted(kind=note.kind, samples=note.samples, rows=rows)


def last_wanted(cache: Path) -> LastWanted | None:
    """Returns what an encode stage on this machine last wanted in a cache; None if that is not known."""
    for file in CacheFolder(cache).machine.glob(f"{_PREFIX}*.json"):
        try:
            return _parsed(read_json(file, TypeAdapter(_Note), most_bytes=MOST_LIST_BYTES))
        except (DocumentError, ValueError, IndexError):
            continue
    return None
