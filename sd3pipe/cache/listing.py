"""What a cache is and what it weighs, and what of that is unused: segments that were displaced, or set aside.

Unused rows cost disk, and save encoding when a change is undone.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe import stopping
from sd3pipe.cache.folder import MANIFEST, CacheFolder, entries_of, is_segment
from sd3pipe.cache.reader import CacheReader
from sd3pipe.errors import InputError
from sd3pipe.files import storage_errors
from sd3pipe.temporaries import remove_tree


def find_caches(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a cache, else the caches in it. Raises InputError if there are none."""
    if (folder / MANIFEST).exists():
        return [folder]
    found = [path for path in sorted(entries_of(folder)) if (path / MANIFEST).exists()]
    if not found:
        raise InputError(f"{folder} is no finished cache and holds none: encode first, or name another folder")
    return found


def describe(cache: Path) -> dict[str, Any]:
    """Returns recipe, fingerprints, counts and sizes of a cache as JSON types."""
    reader = CacheReader(cache, verify_reads="never")
    manifest, index = reader.manifest, reader.index
    unused = unused_files(cache)
    samples = Counter(reader.samples.strings("subset").to_list() if manifest.kind != "prompts" else ())
    counts = np.bincount(index.arrays["row_layout"], minlength=len(index.layouts)).tolist()
    return {
        "cache": str(cache),
        "kind": manifest.kind,
        "rows": manifest.rows,
        "samples": manifest.samples,
        "segments": len(index.segments()),
        "bytes": _folder_bytes(cache),
        "row_bytes": int(index.arrays["row_bytes"].sum(dtype=np.uint64)),
        "recipe": dict(manifest.recipe),
        "recipe_version": manifest.recipe_version,
        "fingerprints": dict(manifest.fingerprints),
        "subsets": {name: {**settings, "samples": samples[name]} for name, settings in manifest.subsets.items()},
        "layouts": [  # the most frequent first
            {"rows": rows, "tensors": {name: [dtype, *shape] for name, dtype, shape in layout}}
            for layout, rows in sorted(zip(index.layouts, counts, strict=True), key=lambda item: -item[1])
        ],
        "quarantined": [dict(entry) for entry in manifest.quarantined],
        "unused": {"files": len(unused), "bytes": sum(item.nbytes for item in unused)},
        "writers": len(entries_of(CacheFolder(cache).writers)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    path: Path
    since: date
    nbytes: int
    damaged: bool


def unused_files(cache: Path) -> list[Unused]:
    """Returns what `delete_unused` could delete, the oldest first; damaged files before whole ones of the same day."""
    folder = CacheFolder(cache)
    found = [*_dated(folder.unused, damaged=False), *_dated(folder.damaged, damaged=True)]
    return sorted(found, key=lambda item: (item.since, not item.damaged, item.path.name))


def delete_unused(
    cache: Path, *, older_than_days: float | None = None, keep_bytes: int | None = None, dry_run: bool = False
) -> list[Unused]:
    """Deletes unused rows and returns them.

    All of them; or those unused for longer than some days; or the oldest, until what remains fits `keep_bytes`. Raises
    InputError if there is no cache, StorageError if a file cannot be deleted.
    """
    CacheFolder(cache).check_exists()
    chosen = unused_files(cache)
    if older_than_days is not None:
        limit = (datetime.now(UTC) - timedelta(days=older_than_days)).date()
        chosen = [item for item in chosen if item.since < limit]
    if keep_bytes is not None:
        remaining = itertools.accumulate(item.nbytes for item in chosen[::-1])
        kept = sum(nbytes <= keep_bytes for nbytes in remaining)  # of the youngest
        chosen = chosen[: len(chosen) - kept]
    if not dry_run:
        for item in chosen:
            stopping.check()
            with storage_errors(item.path):
                remove_tree(item.path)
    return chosen


def _dated(folder: Path, *, damaged: bool) -> Iterator[Unused]:
    for day in entries_of(folder):
        try:
            since = date.fromisoformat(day.name)
        except ValueError:
            continue
        for path in entries_of(day):
            if damaged or is_segment(path):
                nbytes = _folder_bytes(path) if path.is_dir() else path.lstat().st_size
                yield Unused(path=path, since=since, nbytes=nbytes, damaged=damaged)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
