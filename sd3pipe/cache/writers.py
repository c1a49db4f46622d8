"""Who is writing into a cache now. Writers of one plan need no lock; a second plan is refused while a writer lives."""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sd3pipe.cache.folder import CacheFolder, remove_tree
from sd3pipe.errors import StaleError
from sd3pipe.files import make_folder, storage_errors, write_json
from sd3pipe.fingerprint import hash_bytes

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # a writer of another machine that has not touched its file for so long is dead

_CARD = "writer.json"
_BEAT = "beat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """What a writer says about itself in its folder, where its temporary files lie, too."""

    identity: str  # hash of all that it means to publish
    host: str
    pid: int


@contextlib.contextmanager
def writing(folder: CacheFolder, identity: str) -> Iterator[Path]:
    """Registers this process as a writer and gives its folder for temporary files, removed at the end.

    Raises StaleError if a living writer fills this cache from another plan, StorageError if the folder is not writable.
    """
    me = Writer(identity=identity, host=socket.gethostname(), pid=os.getpid())
    scratch = make_folder(folder.writers / _folder_name(me.pid))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(scratch / _BEAT, stop), daemon=True)
    try:
        with storage_errors(scratch):
            (scratch / _BEAT).touch()
        write_json(scratch / _CARD, asdict(me))
        _bury_the_dead_and_refuse(folder, me, scratch)
        beat.start()
        yield scratch
    finally:
        stop.set()
        if beat.is_alive():
            beat.join()
        remove_tree(scratch)


def is_alone(folder: CacheFolder, scratch: Path) -> bool:
    """Whether no other writer lives than the one whose folder is `scratch`."""
    now = _beat_time(scratch)
    return not any(_lives(other, now) for other in _scratch_folders(folder) if other != scratch)


def _bury_the_dead_and_refuse(folder: CacheFolder, me: Writer, scratch: Path) -> None:
    """Removes what dead writers left, and refuses to work beside one that fills another plan."""
    now = _beat_time(scratch)
    for other in _scratch_folders(folder):
        if not _lives(other, now):
            remove_tree(other)
            continue
        writer = _read_card(other)
        if writer is not None and writer.identity != me.identity:
            raise StaleError(
                f"{folder.path} is being filled from another dataset or recipe by process {writer.pid} on "
                f"{writer.host}: wait for it, stop it, or choose another --out"
            )


def _folder_name(pid: int) -> str:
    """Returns a new name that tells whether the process lives: pid, start of the process, machine."""
    return f"{pid}-{_start_mark(pid)}-{_machine()}-{uuid.uuid4().hex[:16]}"


def _machine() -> str:
    """Returns what tells machines apart, and containers that share a machine's name but not its process numbers."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += str(Path("/proc/self/ns/pid").readlink())
    return hash_bytes(name.encode())[:16]


def _lives(scratch: Path, now: float) -> bool:
    """Whether the writer of a folder lives. `now` is the present time by the clock of the cache's file system."""
    pid, started, machine, *_ = [*scratch.name.split("-"), "", "", ""]
    if pid.isdigit() and started and machine == _machine():
        return _start_mark(int(pid)) == started
    return now - _beat_time(scratch) <= SILENT_SECONDS


def _scratch_folders(folder: CacheFolder) -> list[Path]:
    try:
        return [path for path in folder.writers.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _read_card(scratch: Path) -> Writer | None:
    """Returns a writer's description; None while it is not written yet, or if it is damaged."""
    try:
        return Writer(**json.loads((scratch / _CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            file.touch()


def _beat_time(scratch: Path) -> float:
    """Returns when a writer last showed life, by the clock of the file system."""
    for path in (scratch / _BEAT, scratch):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _start_mark(pid: int) -> str:
    """Returns when a living process started, in the kernel's ticks since boot; empty if it is dead or nothing tells."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return numbers[18] if state not in "ZX" else ""
    return ""
