"""Where the parts of a cache lie: what is published, and the machine-local folder beside it."""

import contextlib
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

from sd3pipe.console import listed
from sd3pipe.errors import InputError, StorageError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import make_folder, storage_errors
from sd3pipe.fingerprint import is_hash
from sd3pipe.stages import CAPTIONS

MANIFEST = "manifest.json"
SEGMENTS = "segments"
INDEX = "index"
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".zarr"
_PARTS = (MANIFEST, SEGMENTS, INDEX, CAPTIONS)


def machine_folder(cache: Path) -> Path:
    """Returns the folder of a cache's machine-local files: beside it, on its file system, never in a repository."""
    real = cache.resolve()
    return real.parent / ".sd3pipe" / real.name


def weight_stamps(out: Path, *, trust: bool = True) -> FileStamps:
    """Returns what is remembered of weight files: one file for all that is written beside one another."""
    return FileStamps(machine_folder(out).parent / "weights.json", trust=trust)


def apart_folder(place: Path) -> Path:
    """Returns where a run writes as long as an older one lies in its place."""
    return Path(f"{machine_folder(place)}.new")


class CacheFolder:
    """The paths of one cache folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / MANIFEST
        self.segments = path / SEGMENTS
        self.indexes = path / INDEX
        self.machine = machine_folder(path)
        self.unused = self.machine / "attic"  # segments that were displaced
        self.damaged = self.machine / "damaged"
        self.writers = self.machine / "writers"
        self.unreadable = self.machine / "unreadable"

    def segment(self, plan_id: str) -> Path:
        return self.segments / (plan_id + SUFFIX)

    def index(self, digest: str) -> Path:
        return self.indexes / (digest + INDEX_SUFFIX)

    def create(self) -> None:
        """Makes the folders that a writer needs. Raises StorageError where they cannot be written."""
        for path in (self.segments, self.indexes, self.unused, self.damaged, self.writers, self.unreadable):
            make_folder(path)
        if self.segments.stat().st_dev != self.writers.stat().st_dev:
            raise StorageError(
                f"{self.path} and {self.machine} are on two file systems: mount their common parent instead"
            )

    def check_ours(self) -> None:
        """Raises InputError if the folder holds something that no cache has: it would be published with the cache."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, not a folder: choose another --out")
        foreign = sorted(entry.name for entry in entries_of(self.path) if entry.name not in _PARTS)
        visible = [name for name in foreign if not name.startswith(".")]
        if visible:
            raise InputError(
                f"{self.path} holds {listed(visible)}, no part of a cache: move that away or choose another --out"
            )

    def check_exists(self) -> None:
        """Raises InputError unless a cache is here, or what an encode stage noted about one."""
        if not any(path.exists() for path in (self.manifest, self.segments, self.machine)):
            raise InputError(f"{self.path} holds no finished cache: encode first, or name another folder")

    def segment_ids(self) -> dict[str, Path]:
        """Returns the plan id and path of every segment that lies in the published folder, of the plan or not."""
        return {path.name.removesuffix(SUFFIX): path for path in entries_of(self.segments) if is_segment(path)}

    def unused_segments(self) -> list[Path]:
        """Returns the unused segments, those displaced last first."""
        days = sorted((path for path in entries_of(self.unused) if path.is_dir()), reverse=True)
        return [path for day in days for path in sorted(entries_of(day)) if is_segment(path)]

    def find_segment(self, plan_id: str) -> Path | None:
        """Returns where a segment lies, in the published folder or, if it was displaced, among the unused ones."""
        published = self.segment(plan_id)
        if published.exists():
            return published
        return next((path for path in self.unused_segments() if path.name == published.name), None)

    def displace(self, path: Path) -> None:
        """Makes a segment that the plan no longer needs an unused one, under today's date."""
        with storage_errors(path), contextlib.suppress(FileNotFoundError):  # another writer may have moved it
            path.replace(_today(self.unused) / path.name)

    def set_aside(self, path: Path) -> Path:
        """Moves a damaged or foreign file or folder where nothing reads it, and returns its new place."""
        target = _today(self.damaged) / f"{path.name}.{uuid.uuid4().hex[:8]}"
        with storage_errors(path), contextlib.suppress(FileNotFoundError):
            path.replace(target)
        return target

    def strays(self, live_segments: set[str], index: str | None) -> list[Path]:
        """Returns what lies in segments/ and index/ without being part of the published cache."""
        names = {plan_id + SUFFIX for plan_id in live_segments}
        segments = [path for path in entries_of(self.segments) if path.name not in names]
        return segments + [path for path in entries_of(self.indexes) if path.name != f"{index}{INDEX_SUFFIX}"]


def _today(folder: Path) -> Path:
    """Returns the sub-folder of what was moved into a folder today."""
    return make_folder(folder / datetime.now(UTC).date().isoformat())


def is_segment(path: Path) -> bool:
    """Whether a file has the name of a segment: 64 hex digits and the suffix."""
    stem = path.name.removesuffix(SUFFIX)
    return stem != path.name and is_hash(stem)


def entries_of(folder: Path) -> list[Path]:
    """Returns the paths in a folder; none if it is missing. Raises InputError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if folder.exists():
            raise InputError(f"{folder} is a file where a cache has a folder: move it away") from None
        raise StorageError(f"{folder}: a file is where one of its parent folders would be: choose another") from None
    except PermissionError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror})") from error
