"""Whether any file in some folders has changed, without looking into it: one hash over the stat of all that matter."""

import operator
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.file_stamps import COARSE_CLOCK_NS, stamp_of
from sd3pipe.fingerprint import digest_bytes, hash_chunks, hash_file

_NUMBERS = 6  # for each file: its mode and its stamp
_CHANGED = 3  # the place of its ctime among them


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A folder, the endings of the files that matter in it, and whether they matter in its sub-folders, too."""

    folder: str
    endings: tuple[str, ...]
    recursive: bool


class Look:
    """One look at folders, for all who ask about them: each is listed, and each file in it asked for its stat, once."""

    def __init__(self) -> None:
        self.began_ns = time.time_ns()
        self._listed: dict[str, tuple[os.stat_result, list[os.DirEntry[str]]]] = {}

    def at(self, folder: str) -> tuple[os.stat_result, list[os.DirEntry[str]]]:
        """Returns a folder's stat and its entries by name, which remember their own. Raises OSError."""
        if folder not in self._listed:
            stat = os.stat(folder)  # noqa: PTH116, as below: a Path for each of 100,000 files takes longer than its stat
            with os.scandir(folder) as entries:
                self._listed[folder] = stat, sorted(entries, key=operator.attrgetter("name"))
        return self._listed[folder]


def state_of(file: Path, folders: Iterable[Watched], look: Look | None = None) -> str | None:
    """Returns a hash that changes with the bytes of one file, and with anything that matters in some folders.

    None where stat cannot tell: a file was changed so lately that a further change might leave its stat alone, or it
    cannot be looked at.
    """
    look = look or Look()
    try:
        parts = [os.fsencode(file.resolve()), hash_file(file).encode("ascii")]
        return hash_chunks(parts + [part for watched in folders for part in _states(watched, look)])
    except (OSError, _TooYoungError):
        return None


class _TooYoungError(Exception):
    """A file's next change might not change its stat."""


def _states(watched: Watched, look: Look) -> Iterator[bytes]:
    """Yields digests for each folder, over its inode and the names, times, sizes and inodes of files that matter.

    Of other files the names count, and the times of other folders, for what lies there unused is told, too.

    Raises OSError, and _TooYoungError for a change that was too late for the look.
    """
    endings = tuple(ending.lower() for ending in watched.endings)
    waiting, visited = [watched.folder], set[tuple[int, int]]()
    while waiting:
        here = waiting.pop()
        stat, entries = look.at(here)
        if (stat.st_dev, stat.st_ino) in visited:
            continue
        visited.add((stat.st_dev, stat.st_ino))
        names, stamps, others = list[str](), list[int](), list[str]()
        for entry in entries:
            if watched.recursive and entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(endings):
                names.append(entry.name)
                found = entry.stat()
                stamps += (found.st_mode, *stamp_of(found))
            elif not entry.name.startswith("."):
                others.append(f"{entry.name}/{entry.stat().st_mtime_ns if entry.is_dir() else ''}")
        if max(stamps[_CHANGED::_NUMBERS], default=0) > look.began_ns - COARSE_CLOCK_NS:
            raise _TooYoungError
        told = "\0".join((here, str(stat.st_dev), str(stat.st_ino), *names, "", *others))
        yield digest_bytes(told.encode("utf-8", "surrogateescape"))
        yield digest_bytes(_packed(stamps))


def _packed(numbers: list[int]) -> bytes:
    try:
        return array("q", numbers).tobytes()
    except OverflowError:  # some file systems number their files without end
        return repr(numbers).encode("ascii")
