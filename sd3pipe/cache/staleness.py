"""Did captions or pictures change since they were encoded? For people without DVC: a stat check, machine-local."""

import functools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.last_run import last_run
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, holds, read_json
from sd3pipe.file_stamps import FileStamps, Stamp, stamp_of, tick_ns
from sd3pipe.files import write_bytes
from sd3pipe.fingerprint import hash_bytes, hash_file, hash_json
from sd3pipe.watched import Look, state_of

_FORMAT = 2
_FILE = "sources.json"
_OF_THE_DATASET = {".toml", ".json", ".jsonl", ".csv"}  # the dataset file and the metadata files that it names


_Files: TypeAlias = dict[str, tuple[Any, str | None]]
_Folders: TypeAlias = dict[str, tuple[list[str], str]]


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """`fresh`: nothing changed. `changed`: `changes` says what. `unknown`: `reason` says why it cannot be checked."""

    state: Literal["fresh", "changed", "unknown"]
    changes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What was encoded: for each file its stamp, which is compared and no more, and its hash; of folders a listing.

    Without the `folders` there is nothing to compare; `trees` are folders whose listing has all that lies below them.
    Format 1 has no trees, and went by what stands behind a name's last dot.
    """

    format: Literal[1, 2]
    cache: str | None
    dataset: str
    files: _Files
    folders: _Folders
    trees: _Folders = field(default_factory=dict)

    def changes(self) -> Iterator[str]:
        """Yields what is not as it was, in words."""
        yield from _changes(self.files)
        listing = _listing_by_suffix if self.format == 1 else _listing
        for name, (endings, before) in {**self.folders, **self.trees}.items():
            try:
                now = _listing_below(Path(name), endings) if name in self.trees else listing(Path(name), endings)
            except OSError as error:
                yield f"{name} cannot be read ({error.strerror})"
                continue
            if now != before:
                below = " or a folder below it" if name in self.trees else ""
                yield f"{name}{below} has other files than before"

    def endings_in(self, folder: Path) -> tuple[str, ...]:
        """Returns how the files end that mattered in a folder; none where it was not listed for its pictures."""
        for above in (folder, *folder.parents):
            if str(above) in self.folders and (above == folder or str(above) in self.trees):
                return tuple(ending.lower() for ending in self.folders[str(above)][0])
        return ()


def sources_seen(
    *,
    dataset_file: Path,
    files: Mapping[Path, str | None],
    folders: Mapping[Path, Collection[str]],
    trees: Mapping[Path, Collection[str]] = {},
    remote: Collection[str] = (),
    scan_started: float,
    stamps: FileStamps | None = None,
) -> dict[str, Any]:
    """Returns what to note of a dataset that was just scanned, before encoding, in which it may change again.

    `files` maps every picture, mask and caption file that was read to `hash_file` of its bytes, or to None where any
    change of its stat is to count: to hash a tar takes as long as to encode it. `folders` maps each folder that was
    listed for pictures to the endings (".png", ".txt") of the files that mattered in it, `trees` those folders whose
    sub-folders were listed, too, and those of masks. `remote` are addresses. `scan_started` is
    time.time() before the first file was read: the stat of a file that changed since then says nothing. `stamps` knows
    those that it looked at itself, before they were read.
    """
    resolved = functools.cache(lambda folder: str(Path(folder).resolve()))  # once for each: 20,000 files are cheap
    started_ns = int(scan_started * 1e9)

    def absolute(path: Path) -> str:
        folder, name = os.path.split(str(path))
        return f"{resolved(folder)}{os.sep}{name}"

    def settled(path: Path) -> Stamp | None:
        """None if it changed so late that its hash may be that of an earlier content."""
        if stamps and (looked := stamps.looked(path)):
            return looked
        stamp = _stamp(str(path))
        return stamp if stamp[2] + tick_ns(stamp) < started_ns else None

    digests: dict[Path, str | None] = {dataset_file: hash_file(dataset_file), **files}
    return {
        "format": _FORMAT,
        "dataset": str(dataset_file.resolve()),
        "files": {absolute(path): (settled(path), digest) for path, digest in digests.items()},
        "folders": {
            str(folder.resolve()): [sorted(endings), _listing(folder, endings)] for folder, endings in folders.items()
        }
        | {address: [[], ""] for address in remote},
        "trees": {
            str(folder.resolve()): [sorted(endings), _listing_below(folder, endings)]
            for folder, endings in trees.items()
        },
    }


def remember_sources(cache: Path, seen: Mapping[str, Any]) -> None:
    """Notes beside a cache what it was encoded from, unless that is noted already. Raises StorageError."""
    data = json.dumps({**seen, "cache": _published(cache)}).encode("utf-8", "surrogatepass")
    file = CacheFolder(cache).machine / _FILE
    if not holds(file, data):
        write_bytes(file, data)


def check_sources(cache: Path, look: Look | None = None) -> SourceCheck:
    """Compares the files that a cache was encoded from with what they are now. A touched file alone is fresh.

    Caches of one dataset share a `look` at its folders.
    """
    last = last_run(cache)
    if last and last.published == _published(cache) and last.state == state_of(Path(last.dataset), last.watched, look):
        return SourceCheck("fresh")
    return Sources(cache).check()


class Sources:
    """What a cache was encoded from, by the note beside it, for comparison with what there is now."""

    def __init__(self, cache: Path) -> None:
        try:
            self._note = read_json(CacheFolder(cache).machine / _FILE, TypeAdapter(_Note), most_bytes=MOST_LIST_BYTES)
        except DocumentError:
            self._note = _Note(format=_FORMAT, cache=None, dataset="", files={}, folders={})
        self._unknown = _why_unknown(cache, self._note)

    def check(self) -> SourceCheck:
        return self._unknown or _compared(self._note.changes())

    def check_picture(self, name: str, image_hash: str) -> SourceCheck:
        """Compares what one picture's rows were made from: its files, those that came to it, those of the dataset.

        `name` and `image_hash` are those of the samples table.
        """
        if self._unknown:
            return self._unknown
        files, stem = self._note.files, Path(name).stem
        alike = [path for file in files if stem in file and self._is_of((path := Path(file)), stem)]
        places = {
            path.parent for path in alike if files[str(path)][1] == image_hash and path.as_posix().endswith(f"/{name}")
        }
        about = dict(self._of_dataset)
        about |= {path: known for path, known in files.items() if known[1] is None}  # the picture may lie in it
        # a folder that was not listed for pictures holds masks
        about |= {str(p): files[str(p)] for p in alike if p.parent in places or not self._note.endings_in(p.parent)}
        for place in (place for place in places if self._note.endings_in(place) and place.is_dir()):
            names = (name for name in os.listdir(place) if name.startswith(stem))  # noqa: PTH208, a Path for each is slow
            siblings = (str(path) for name in names if self._is_of((path := place / name), stem))
            about |= {path: (None, "") for path in siblings if path not in files}
        return _compared(_changes(about))

    def _is_of(self, path: Path, stem: str) -> bool:
        """Returns whether a file belongs to a picture of this name, as that itself, its caption or its mask."""
        if endings := self._note.endings_in(path.parent):
            return path.name.startswith(stem) and path.name[len(stem) :].lower() in endings
        return path.stem == stem

    @functools.cached_property
    def _of_dataset(self) -> _Files:
        files = self._note.files
        return {path: files[path] for path in files if _suffix(path).lower() in _OF_THE_DATASET}


def _why_unknown(cache: Path, note: _Note) -> SourceCheck | None:
    """Returns why a cache cannot be compared with its sources; None where it can."""
    if not note.dataset:
        return SourceCheck("unknown", reason=f"{cache} was not encoded on this machine")
    if note.cache != _published(cache):
        return SourceCheck("unknown", reason=f"{cache} was replaced since it was encoded on this machine")
    gone = [path for path in (note.dataset, *note.folders) if not os.path.exists(path)]  # noqa: PTH110, raises nothing
    if gone:
        return SourceCheck("unknown", reason=f"{gone[0]}, which {cache} was encoded from, is not here")
    return None


def _compared(changes: Iterable[str]) -> SourceCheck:
    found = tuple(changes)
    return SourceCheck("changed", found) if found else SourceCheck("fresh")


def _changes(files: _Files) -> Iterator[str]:
    for name, (stamp, digest) in files.items():
        try:
            if list(_stamp(name)) != stamp and (digest is None or hash_file(Path(name)) != digest):
                yield f"{name} is new" if digest == "" else f"{name} was changed"
        except (OSError, ValueError):  # ValueError: no path of a file
            yield f"{name} is gone"


def _published(cache: Path) -> str | None:
    """Returns the index that the cache has now: a cache that was pulled or restored has another one."""
    manifest = read_manifest(CacheFolder(cache).manifest)
    return None if manifest is None else hash_bytes(manifest.to_bytes())


def _stamp(path: str) -> Stamp:
    return stamp_of(os.stat(path))  # noqa: PTH116, a Path for each of 100,000 files takes longer than its stat


def _listing(folder: Path, endings: Collection[str]) -> str:
    """Returns a hash of the names that matter in a folder, not in its sub-folders. Raises OSError."""
    with os.scandir(folder) as entries:
        return hash_json(sorted(_that_matter((entry.name for entry in entries), endings)))


def _listing_below(folder: Path, endings: Collection[str]) -> str:
    """Returns a hash of the names that matter in a folder and in all below it, of which each real one counts once."""
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        stat = os.stat(here)  # noqa: PTH116, a Path for each takes longer
        if (stat.st_dev, stat.st_ino) in visited:
            below.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = os.path.relpath(here, folder)
        found += (f"{inside}/{name}" for name in _that_matter(names, endings))
    return hash_json(sorted(found))


def _that_matter(names: Iterable[str], endings: Collection[str]) -> Iterator[str]:
    wanted = tuple(ending.lower() for ending in endings)
    return (name for name in names if name.lower().endswith(wanted) and not name.startswith("."))


def _listing_by_suffix(folder: Path, suffixes: Collection[str]) -> str:
    """Returns what stands in a note of format 1 for the names that mattered in a folder. Raises OSError."""
    wanted = {suffix.lower() for suffix in suffixes}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _suffix(entry.name).lower() in wanted)
    return hash_json(names)


def _suffix(name: str) -> str:
    """Returns what Path(name).suffix does, in a tenth of the time."""
    stem, dot, ending = name.rpartition(".")
    return dot + ending if stem and ending else ""
