"""Files that are never half there. The only module that relies on link(2), flock or fsync of a folder."""

import contextlib
import difflib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from sd3pipe.errors import StorageError

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EACCES}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def storage_error(error: OSError, path: Path) -> StorageError:
    """Returns the one-line error for a failed write at `path`."""
    if error.errno in _FULL:
        return StorageError(f"{path}: the disk is full: free space, then run the same command again")
    if error.errno in _NOT_WRITABLE:
        return StorageError(f"{path}: cannot be written ({os.strerror(error.errno or 0)}): choose a writable folder")
    if error.errno == errno.EISDIR:
        return StorageError(f"{path}: is a folder, and a file is to be written: name a file")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageError(f"{path}: {_file_in_the_way(path)} is a file, not a folder: choose another place")
    return StorageError(f"{path}: writing failed ({error.strerror or error})")


def _file_in_the_way(path: Path) -> Path:
    return next((part for part in (*reversed(path.parents), path) if part.is_file()), path)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns any OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def make_folder(path: Path) -> Path:
    """Creates a folder with its parents and returns it. Raises StorageError."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def temporary_name(folder: Path, label: str = "") -> Path:
    """Returns an unused path in `folder` that no other process or host will choose."""
    return folder / f"tmp-{label}{'-' if label else ''}{os.getpid()}-{uuid.uuid4().hex}"


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable, where the system can open a folder at all."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(handle: IO[Any]) -> None:
    """Flushes a file's content to the disk."""
    handle.flush()
    os.fsync(handle.fileno())


@contextlib.contextmanager
def atomic_file(path: Path, *, temporary_in: Path | None = None) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces `path` when the block ends well, and vanishes when it does not.

    `temporary_in` must be on the file system of `path`; it defaults to the folder of `path`. Raises StorageError.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(temporary_in or path.parent, path.name)
        try:
            with open(temporary, "xb") as handle:
                yield handle
                sync_file(handle)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` atomically. Raises StorageError."""
    with atomic_file(path) as handle:
        handle.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8 with Unix line ends, atomically. Raises StorageError.

    Names of files that are no UTF-8, which Python has as lone surrogates, are written as the bytes that they are.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by indented JSON with sorted keys, atomically. Raises StorageError."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Locks a file for this process until the block ends or the process dies; yields whether nobody else holds it.

    Processes that this one forks do not hold the lock, so that they may outlive it. Yields True also where the system
    or the file system has no locks. Raises StorageError.
    """
    make_folder(path.parent)
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _lock_handles.add(handle)
    try:
        yield fcntl is None or _locked(handle)
    finally:
        if handle in _lock_handles:
            _lock_handles.remove(handle)
            os.close(handle)


def _forget_locks() -> None:
    """Closes what a forked process has inherited: a lock lasts until its last handle is closed."""
    while _lock_handles:
        os.close(_lock_handles.pop())


_lock_handles: set[int] = set()
if hasattr(os, "register_at_fork"):  # absent on Windows
    os.register_at_fork(after_in_child=_forget_locks)


def _locked(handle: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def publish_once(temporary: Path, final: Path) -> bool:
    """Gives a finished file its name unless the name is taken; returns whether this call gave it.

    link(2) never overwrites, so the first of several writers wins. Where the file system has no links, rename does,
    which is equally good here: two files of one name have the same content.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        temporary.unlink()
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        temporary.replace(final)
    else:
        temporary.unlink()
    sync_folder(final.parent)
    return True


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, also for a pipe, which is not waited for, and a device."""
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115, the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe waits for its writer otherwise


def nearest_path(path: Path) -> str:
    """Returns ' (did you mean X?)' for what lies beside a missing path and has the nearest name, or nothing."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f" (did you mean {path.parent / matches[0]}?)" if matches else ""


def free_bytes(path: Path) -> int:
    """Returns the free space of the file system that `path`, or its nearest existing parent, lies on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
