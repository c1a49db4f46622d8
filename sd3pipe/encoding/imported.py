"""Rows that sd-scripts encoded: how their keys differ from those of our own rows, and which of them there are.

An imported row has `imported_from` in its recipe, so its key is never that of a row that was encoded here. The encode
stages want it in place of their own where a cache of imported rows (`--imported`) has it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd3pipe.cache.folder import MANIFEST
from sd3pipe.cache.keys import Kind
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.samples import hex_list
from sd3pipe.cache.wanted import Wanted
from sd3pipe.errors import InputError

SD_SCRIPTS = "sd-scripts"
MARK = "imported_from"

ImportedKeys = frozenset[str]


def imported_recipe(kind: Kind, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe of a row that sd-scripts made with settings like these, as far as they are known.

    Its latents are one draw from the moments, by a VAE of unknown precision.
    """
    own = {"latent_mode": "sample", "vae_dtype": "unknown"} if kind == "latents" else {}
    return {**recipe, **own, MARK: SD_SCRIPTS}


def imported_keys(folder: Path | None, kind: Kind) -> ImportedKeys:
    """Returns the keys of the rows that were imported into a folder. Raises InputError for one that has no caches."""
    cache = imported_cache(folder, kind)
    if cache is None:
        return frozenset()
    reader = CacheReader(cache, verify_reads="never")
    if reader.manifest.kind != kind or MARK not in reader.manifest.recipe:
        raise InputError(f"{cache} is no cache of imported {kind}: --imported names the folder that from-kohya wrote")
    return frozenset(hex_list(reader.keys))


def imported_cache(folder: Path | None, kind: Kind) -> Path | None:
    """Returns the cache of imported rows of a kind, None where there is none of that kind."""
    if folder is None:
        return None
    kinds = {path.parent.name for path in folder.glob(f"*/{MANIFEST}")}
    if not kinds & {"latents", "text"}:
        raise InputError(f"{folder} holds no imported rows: take paths.imported out of project.toml, or import again")
    return folder / kind if kind in kinds else None


def imported_rows(wanted: Wanted) -> int:
    """Returns how many of the wanted rows are imported ones."""
    return sum(MARK in row.recipe for row in wanted.row_by_key.values())


def imported_words(wanted: Wanted) -> str:
    """Returns what the summary line says of imported rows, nothing where there are none."""
    rows = imported_rows(wanted)
    return f", {rows} of all rows from {SD_SCRIPTS}" if rows else ""


def check_not_imported(keys: Iterable[str], wanted: Wanted) -> None:
    """Raises InputError if one of the rows to encode is an imported one: what we encode must not go by its key."""
    lost = sum(MARK in wanted.row_by_key[key].recipe for key in keys)
    if lost:
        raise InputError(
            f"{lost} rows that {SD_SCRIPTS} encoded are damaged: take paths.imported out of project.toml to encode all "
            "rows here, or import again with `sd3pipe from-kohya --import-cache`"
        )
