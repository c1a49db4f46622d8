"""Checks everything a cache says about itself: hashes, digests, keys, sizes, references."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd3pipe import stopping
from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.index import Index, header_table
from sd3pipe.cache.manifest import Manifest, contradiction, read_manifest
from sd3pipe.cache.publish import open_index
from sd3pipe.cache.segment import key_is_true, read_header, read_rows
from sd3pipe.errors import InputError

_COLUMNS = ("keys", "digests", "offsets", "sizes")  # of a RowTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong. `path` is what `repair` moves aside; None where nothing has to move."""

    what: str
    path: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    segments: int
    rows: int
    nbytes: int
    problems: tuple[Problem, ...]


def verify_cache(cache: Path, *, threads: int | None = None) -> Verification:
    """Checks a cache and its unused rows, reading every byte. Raises InputError if there is no cache at all."""
    folder = CacheFolder(cache)
    folder.check_exists()
    problems: list[Problem] = []
    manifest, index = _open(folder, problems)
    live = dict.fromkeys(folder.segment(plan_id) for plan_id in index.plan_ids()) if index is not None else {}
    problems += [Problem(what=f"{path} is missing: encode again", path=None) for path in live if not path.exists()]
    paths = [*folder.segment_ids().values(), *folder.unused_segments()]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        checked = list(pool.map(lambda path: _check_segment(path, manifest, folder, index), paths))
    problems += dict.fromkeys(problem for _, problem in checked if problem is not None)
    if index is not None and manifest is not None:
        problems += _check_references(folder, manifest, index)
    return Verification(
        segments=len(paths),
        rows=sum(rows for rows, _ in checked),
        nbytes=sum(path.stat().st_size for path in paths),
        problems=tuple(problems),
    )


def repair(cache: Path, verification: Verification) -> list[Path]:
    """Moves what is damaged aside, so that the next encode fills the hole, and returns where it went."""
    folder = CacheFolder(cache)
    return [folder.set_aside(problem.path) for problem in verification.problems if problem.path is not None]


def _open(folder: CacheFolder, problems: list[Problem]) -> tuple[Manifest | None, Index | None]:
    try:
        manifest = read_manifest(folder.manifest)
    except InputError as error:
        problems.append(Problem(what=str(error), path=folder.manifest))
        return None, None
    if manifest is None:
        problems.append(Problem(what=f"{folder.path} holds no finished cache: run the encode stage", path=None))
        return None, None
    try:
        return manifest, open_index(folder, manifest)
    except InputError as error:
        path = folder.index(manifest.index)
        problems.append(Problem(what=str(error), path=path if path.exists() else None))
        return manifest, None


def _check_segment(
    path: Path, manifest: Manifest | None, folder: CacheFolder, index: Index | None
) -> tuple[int, Problem | None]:
    """Returns how many rows of a segment were read, and what is wrong with it."""
    stopping.check()
    count = 0
    try:
        header = read_header(path)
        if manifest is not None and header.kind != manifest.kind:
            return 0, Problem(what=f"{path} holds rows of {header.kind}, not of {manifest.kind}", path=path)
        for info, _, whole in read_rows(path, header):
            count += 1
            if not whole:
                return count, Problem(what=f"{path}: row {info.key} does not have its digest", path=path)
            if not key_is_true(header.kind, info):
                return count, Problem(what=f"{path}: row {info.key} was not made from what its key says", path=path)
        plan_id = path.name.split(".")[0]
        indexed = index is not None and path.parent == folder.segments and plan_id in index.segments()
        if index is not None and indexed:
            ours, theirs = index.row_table([plan_id]), header_table({plan_id: header})
            same = all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in _COLUMNS)
            if not same or list(ours.layout_of) != list(theirs.layout_of):
                return count, Problem(what=f"{path}: the index places its rows elsewhere", path=path)
        if manifest is not None and indexed:
            made_from = {id(info.ingredients): info.ingredients for info in header.rows}
            said = next(filter(None, (contradiction(manifest, parts) for parts in made_from.values())), "")
            if said:
                return count, Problem(what=f"{folder.manifest} {said}: it was changed", path=folder.manifest)
    except PermissionError:
        raise  # nothing is known of the rows, and --repair must not move them
    except (InputError, OSError, EOFError) as error:
        return count, Problem(what=str(error), path=path if path.exists() else None)
    return count, None


def _check_references(folder: CacheFolder, manifest: Manifest, index: Index) -> Iterator[Problem]:
    """Yields what is wrong between manifest, index and samples."""
    where = folder.index(manifest.index)
    arrays = index.arrays
    if (manifest.rows, manifest.samples) != (len(index), len(index.samples)):
        yield Problem(what=f"{folder.manifest} counts other rows or samples than {where}", path=folder.manifest)
    if len(set(zip(arrays["row_segment"].tolist(), arrays["row_offset"].tolist(), strict=True))) != len(index):
        yield Problem(what=f"{where}: two rows lie at one place", path=where)
    for path in folder.strays(set(index.plan_ids()), manifest.index):
        yield Problem(what=f"{path} is no part of the cache: run the encode stage, which moves it away", path=None)
