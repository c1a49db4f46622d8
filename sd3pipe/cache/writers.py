"""Who is writing into a cache now. Writers of one plan need no lock; a second plan is refused while a writer lives."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import StaleError
from sd3pipe.files import make_folder, open_handle, storage_errors, write_json
from sd3pipe.living import is_alive, process_mark
from sd3pipe.temporaries import remove_tree

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # a writer of another machine that has touched its file within this time lives
WATCH_BEATS = 4

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
    scratch = make_folder(folder.writers / process_mark())
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
    return _living([other for other in _scratch_folders(folder) if other != scratch], _beat_time(scratch)) == []


def _bury_the_dead_and_refuse(folder: CacheFolder, me: Writer, scratch: Path) -> None:
    """Removes what dead writers left, and refuses to work beside one that fills another plan."""
    others = [other for other in _scratch_folders(folder) if other != scratch]
    living = _living(others, _beat_time(scratch))
    for other in others:
        if other not in living:
            remove_tree(other)
            continue
        try:
            writer = read_json(other / _CARD, TypeAdapter(Writer))
        except DocumentError:  # it is not written yet, or damaged
            continue
        if writer.identity != me.identity:
            raise StaleError(
                f"{folder.path} is being filled from another dataset or recipe by process {writer.pid} on "
                f"{writer.host}: wait for it, stop it, or choose another --out"
            )


def _living(scratches: Sequence[Path], now: float) -> list[Path]:
    """Returns the folders whose writers live. `now` is the present time by the clock of the cache's file system.

    A writer of this machine is looked up. One of another machine lives if it has just shown life; where the clocks may
    differ, for its sign of life lies in the future or is old, it is watched until it shows life again, or should have.
    """
    living, watched = [], {}
    for scratch in scratches:
        lives = is_alive(scratch.name)
        beat = _beat_time(scratch)
        if lives is None and not 0 <= now - beat <= SILENT_SECONDS:
            watched[scratch] = beat
        elif lives or lives is None:
            living.append(scratch)
    if watched:
        log.info("waiting %.0f s to see whether a writer of another machine still lives", WATCH_BEATS * BEAT_SECONDS)
        end = time.monotonic() + WATCH_BEATS * BEAT_SECONDS
        while time.monotonic() < end and any(_beat_time(scratch) == beat for scratch, beat in watched.items()):
            time.sleep(BEAT_SECONDS / 5)
        living += [scratch for scratch, beat in watched.items() if scratch.exists() and _beat_time(scratch) != beat]
    return living


def _scratch_folders(folder: CacheFolder) -> list[Path]:
    try:
        return [path for path in folder.writers.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            file.touch()


def _beat_time(scratch: Path) -> float:
    """Returns when a writer last showed life, by the clock of the file system."""
    for path in (scratch / _BEAT, scratch):
        with contextlib.suppress(OSError):
            with contextlib.suppress(PermissionError):  # Windows opens no folder
                os.close(open_handle(path))  # NFS asks its server when a file is opened
            return path.stat().st_mtime
    return 0.0
