"""Did captions or pictures change since they were encoded? For people without DVC: a stat check, machine-local."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.files import write_bytes
from sd3pipe.fingerprint import hash_bytes, hash_file, hash_json
from sd3pipe.stat_memory import Stamp, stamp_of, tick_ns

_FORMAT = 1
_FILE = "sources.json"


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """`fresh`: nothing changed. `changed`: `changes` says what. `unknown`: `reason` says why it cannot be checked."""

    state: Literal["fresh", "changed", "unknown"]
    changes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What was encoded: for each file its stamp, which is compared and no more, and its hash; of folders a listing."""

    format: Literal[1]
    cache: str | None
    dataset: str
    files: dict[str, tuple[Any, str]]
    folders: dict[str, tuple[list[str], str]]


def remember_sources(
    cache: Path,
    *,
    dataset_file: Path,
    files: Mapping[Path, str],
    folders: Mapping[Path, Collection[str]],
    scan_started: float,
) -> None:
    """Notes beside a cache what it was encoded from, unless that is noted already. Raises StorageError.

    `files` maps every picture, mask and caption file that was read to `hash_file` of its bytes. `folders` maps each
    folder that was listed to the suffixes (".png", ".txt") of the files that mattered in it. `scan_started` is
    time.time() before the first file was read: the stat of a file that changed since then says nothing.
    """
    resolve = _Resolver()
    digests = {resolve(dataset_file): hash_file(dataset_file)} | {resolve(path): files[path] for path in files}
    started_ns = int(scan_started * 1e9)
    note = {
        "format": _FORMAT,
        "cache": _published(cache),
        "dataset": str(dataset_file.resolve()),
        "files": {path: [_settled_stamp(path, started_ns), digest] for path, digest in digests.items()},
        "folders": {
            str(folder.resolve()): [sorted(suffixes), _listing(folder, suffixes)]
            for folder, suffixes in folders.items()
        },
    }
    data = json.dumps(note, sort_keys=True).encode("utf-8", "surrogatepass")
    file = CacheFolder(cache).machine / _FILE
    if not file.exists() or file.read_bytes() != data:
        write_bytes(file, data)


def check_sources(cache: Path) -> SourceCheck:
    """Compares the files that a cache was encoded from with what they are now. A touched file alone is fresh."""
    note = _read_note(CacheFolder(cache).machine / _FILE)
    if note is None:
        return SourceCheck("unknown", reason=f"{cache} was not encoded on this machine")
    if note.cache != _published(cache):
        return SourceCheck("unknown", reason=f"{cache} was replaced since it was encoded on this machine")
    gone = [path for path in (note.dataset, *note.folders) if not os.path.exists(path)]  # noqa: PTH110, which raises nothing
    if gone:
        return SourceCheck("unknown", reason=f"{gone[0]}, which {cache} was encoded from, is not here")
    changes = tuple(_changes(note))
    return SourceCheck("changed", changes) if changes else SourceCheck("fresh")


def _changes(note: _Note) -> Iterator[str]:
    for name, (stamp, digest) in note.files.items():
        try:
            if list(_stamp(name)) != stamp and hash_file(Path(name)) != digest:
                yield f"{name} was changed"
        except (OSError, ValueError):  # ValueError: no path of a file
            yield f"{name} is gone"
    for name, (suffixes, listing) in note.folders.items():
        try:
            if _listing(Path(name), suffixes) != listing:
                yield f"{name} has other files than before"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def _published(cache: Path) -> str | None:
    """Returns the index that the cache has now: a cache that was pulled or restored has another one."""
    manifest = read_manifest(CacheFolder(cache).manifest)
    return None if manifest is None else hash_bytes(manifest.to_bytes())


def _stamp(path: str) -> Stamp:
    return stamp_of(os.stat(path))  # noqa: PTH116, a Path for each of 100,000 files takes longer than its stat


def _settled_stamp(path: str, started_ns: int) -> Stamp | None:
    """Returns a file's stamp; None if it changed so late that its hash may be that of an earlier content."""
    stamp = _stamp(path)
    return stamp if stamp[2] + tick_ns(stamp) < started_ns else None


class _Resolver:
    """Returns absolute paths; each folder is resolved once, which is what makes 20,000 files cheap."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: Path) -> str:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = str(Path(folder).resolve())
        return f"{self._folders[folder]}{os.sep}{name}"


def _listing(folder: Path, suffixes: Collection[str]) -> str:
    """Returns a hash of the names that matter in a folder, not in its sub-folders."""
    wanted = {suffix.lower() for suffix in suffixes}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _suffix(entry.name).lower() in wanted)
    return hash_json(names)


def _suffix(name: str) -> str:
    """Returns what Path(name).suffix does, in a tenth of the time."""
    stem, dot, ending = name.rpartition(".")
    return dot + ending if stem and ending else ""


def _read_note(file: Path) -> _Note | None:
    try:
        return read_json(file, TypeAdapter(_Note), most_bytes=MOST_LIST_BYTES)
    except DocumentError:
        return None
