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
    started: str  # distinguishes processes that had one pid; empty where the system does not tell


@contextlib.contextmanager
def writing(folder: CacheFolder, identity: str) -> Iterator[Path]:
    """Registers this process as a writer and gives its folder for temporary files, removed at the end.

    Raises StaleError if a living writer fills this cache from another plan, StorageError if the folder is not writable.
    """
    me = Writer(identity=identity, host=host_name(), pid=os.getpid(), started=_start_mark(os.getpid()))
    scratch = make_folder(folder.writers / f"{me.pid}-{uuid.uuid4().hex}")
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(scratch / _BEAT, stop), daemon=True)
    try:
        _touch(scratch / _BEAT)
        write_json(scratch / _CARD, asdict(me))
        _bury_the_dead_and_refuse(folder, me, scratch)
        beat.start()
        yield scratch
    finally:
        stop.set()
        if beat.is_alive():
            beat.join()
        remove_tree(scratch)


def living_writers(folder: CacheFolder, beat_now: float) -> dict[Path, Writer]:
    """Returns the writers that live, by their folders. `beat_now` is the present time on the cache's file system."""
    found = {}
    for scratch in _scratch_folders(folder):
        writer = _read_card(scratch)
        if writer is not None and _lives(writer, scratch, beat_now):
            found[scratch] = writer
    return found


def host_name() -> str:
    """Returns what tells machines apart, and containers that share a machine's name but not its process numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _bury_the_dead_and_refuse(folder: CacheFolder, me: Writer, scratch: Path) -> None:
    """Removes what dead writers left, and refuses to work beside one that fills another plan."""
    beat_now = _beat_time(scratch)
    living = living_writers(folder, beat_now)
    for other, writer in living.items():
        if other != scratch and writer.identity != me.identity:
            raise StaleError(
                f"{folder.path} is being filled from another dataset or recipe by process {writer.pid} on "
                f"{writer.host.split()[0]}: wait for it, stop it, or choose another --out"
            )
    for other in _scratch_folders(folder):
        being_born = _read_card(other) is None and beat_now - _beat_time(other) <= SILENT_SECONDS
        if other not in living and not being_born:
            remove_tree(other)


def _lives(writer: Writer, scratch: Path, beat_now: float) -> bool:
    if writer.started and writer.host == host_name():
        return _start_mark(writer.pid) == writer.started
    return beat_now - _beat_time(scratch) <= SILENT_SECONDS


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


def _touch(file: Path) -> None:
    with storage_errors(file):
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
