"""Unused rows: segments that were displaced or set aside. They cost disk, and save encoding when a change is undone."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from sd3pipe import stopping
from sd3pipe.cache.folder import CacheFolder, entries_of, is_segment
from sd3pipe.files import storage_errors
from sd3pipe.temporaries import remove_tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """One unused file or folder."""

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
        chosen = _oldest_beyond(chosen, keep_bytes)
    if not dry_run:
        for item in chosen:
            stopping.check()
            with storage_errors(item.path):
                remove_tree(item.path)
    return chosen


def _oldest_beyond(items: list[Unused], keep_bytes: int) -> list[Unused]:
    total, chosen = sum(item.nbytes for item in items), []
    for item in items:
        if total <= keep_bytes:
            break
        chosen.append(item)
        total -= item.nbytes
    return chosen


def _dated(folder: Path, *, damaged: bool) -> Iterator[Unused]:
    for day in entries_of(folder):
        try:
            since = date.fromisoformat(day.name)
        except ValueError:
            continue
        for path in entries_of(day):
            if damaged or is_segment(path):
                yield Unused(path=path, since=since, nbytes=_size(path), damaged=damaged)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.lstat().st_size
