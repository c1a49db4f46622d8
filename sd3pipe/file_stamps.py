"""What was found out about files, remembered while their stat stays the same. Machine-local, never authoritative."""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISLNK
from typing import Any, Literal

from pydantic import TypeAdapter

from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.errors import StorageError
from sd3pipe.files import write_bytes
from sd3pipe.remote import Remote, is_address

log = logging.getLogger(__name__)

_FORMAT = 1
_FINE_CLOCK_NS = 20_000_000  # two ticks of a kernel's 100 Hz clock
COARSE_CLOCK_NS = 2_000_000_000  # FAT, the coarsest, counts in two seconds

Stamp = tuple[int, int, int, int, int]  # size, mtime_ns, ctime_ns, device, inode


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    format: Literal[1]
    files: dict[str, tuple[Stamp, dict[str, Any]]]


class FileStamps:
    """A file of JSON values, each tied to one file and a name for what was found out about it ("picture", "tensors").

    A value is recalled only while real path, size, mtime, ctime, device and inode are what they were when `recall` (or,
    without one, `remember`) looked. So call `recall` first, then read the file, then `remember`: a file that changes in
    between is found changed. A look that recalls nothing waits until the file is old enough for that: a tick of the
    clock, once for all files that are there. With `trust=False` nothing is recalled, but what is remembered is saved.
    """

    def __init__(self, file: Path, trust: bool = True) -> None:
        self._file = file
        self._trust = trust
        self._entries = _read_entries(file)
        self._looked: dict[str, Stamp | None] = {}  # None: any change might go unseen
        self._new: dict[str, dict[str, Any]] = {}
        self._listed: dict[str, Stamp] = {}  # of files behind addresses
        self._real: dict[str, str] = {}  # real path by the path that was asked for
        self._real_folders: dict[str, str] = {}

    def note_listed(self, address: str, stamp: Stamp) -> None:
        """Takes the stamp of a file that is no file here from who listed it: it is looked at no more."""
        self._listed[address] = stamp

    def recall(self, path: Path | Remote, what: str) -> Any | None:
        """Returns the value remembered about an unchanged file, else None; None for a missing file, too."""
        try:
            real, stamp = self._look(path)
            if stamp == self._looked.get(real) and what in self._new.get(real, {}):
                return self._new[real][what]
            known_stamp, values = self._entries.get(real, (None, {}))
            if self._trust and stamp == known_stamp and what in values:
                self._note(real, stamp)
                return values[what]
            self._note(real, self._settled(real))
        except OSError:
            pass
        return None

    def remember(self, path: Path | Remote, what: str, value: Any) -> None:
        """Ties a JSON value to the file as it was when last recalled. Raises OSError for a missing file."""
        real, _ = self._look(path)
        if real not in self._looked:
            self._note(real, self._settled(real))
        self._new.setdefault(real, {})[what] = value

    def looked(self, path: Path) -> Stamp | None:
        """Returns the stamp of a file as it was last recalled; None if it was not, or any change might go unseen."""
        return self._looked.get(self._real.get(str(path), ""))

    def save(self) -> None:
        """Merges what is new into the file, dropping files that are gone. A failure costs only a warning."""
        if not self._new:
            return
        before = _read_entries(self._file).items()
        entries = {real: entry for real, entry in before if is_address(real) or os.path.lexists(real)}
        for real, values in self._new.items():
            stamp = self._looked[real]
            if stamp is None:
                continue
            known_stamp, known = entries.get(real, (None, {}))
            entries[real] = (stamp, {**known, **values} if known_stamp == stamp else values)
        try:
            write_bytes(self._file, json.dumps({"format": _FORMAT, "files": entries}).encode("utf-8", "surrogatepass"))
        except StorageError as error:
            log.warning("file hashes are not remembered for the next run: %s", error)
            return
        self._entries, self._new = entries, {}

    def _settled(self, real: str) -> Stamp | None:
        return self._listed[real] if real in self._listed else _settled_stamp(Path(real))

    def _note(self, real: str, stamp: Stamp | None) -> None:
        """Notes the stamp that further findings belong to, and drops those that belong to another one."""
        if self._looked.get(real, stamp) != stamp:
            self._new.pop(real, None)
        self._looked[real] = stamp

    def _look(self, path: Path | Remote) -> tuple[str, Stamp]:
        """Returns resolved path and stamp; folders are resolved once, which is what makes 100,000 files cheap."""
        text = str(path)
        if text in self._listed:
            return text, self._listed[text]
        folder, name = os.path.split(text)
        if folder not in self._real_folders:
            self._real_folders[folder] = str(Path(folder).resolve())
        real = f"{self._real_folders[folder]}{os.sep}{name}"
        stat = os.lstat(real)
        if S_ISLNK(stat.st_mode):
            target = Path(real).resolve()
            real, stat = str(target), target.stat()
        self._real[text] = real
        return real, stamp_of(stat)


def stamp_of(stat: os.stat_result) -> Stamp:
    """Returns the part of a stat that changes whenever a file's content does."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


def tick_ns(stamp: Stamp) -> int:
    """Returns how long after a change a further one may leave a file's times as they are."""
    coarse = stamp[1] % 1_000_000_000 == 0 and stamp[2] % 1_000_000_000 == 0
    return COARSE_CLOCK_NS if coarse else _FINE_CLOCK_NS


def _settled_stamp(path: Path) -> Stamp | None:
    """Returns the stamp of a file from now on: whatever changes the file later changes the stamp.

    A younger file than its clock's tick is waited for. None for one whose times lie ahead of this machine's clock, as
    another machine's may, and for one that is changed without a pause.
    """
    for _ in range(2):
        stamp = stamp_of(path.stat())
        age, tick = time.time_ns() - stamp[2], tick_ns(stamp)
        if age >= tick:
            return stamp
        if age >= 0:
            time.sleep((tick - age) / 1e9)
    return None


def _read_entries(file: Path) -> dict[str, tuple[Stamp, dict[str, Any]]]:
    """Returns the saved entries; a missing, damaged or foreign file is an empty one."""
    try:
        return read_json(file, TypeAdapter(_File), most_bytes=MOST_LIST_BYTES).files
    except DocumentError:
        return {}
