"""Files that are never half there. The only module that relies on link(2), flock, preadv or fsync of a folder."""

import contextlib
import difflib
import errno
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from sd3pipe.errors import StorageError
from sd3pipe.living import living_pid, process_mark
from sd3pipe.temporaries import remove_tree, temporary_name

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EACCES, errno.EINVAL}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_NO_WAIT, _NO_FOLLOW = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW"))  # absent on Windows
_AS_IT_IS = getattr(os, "O_BINARY", 0)  # Windows alone has it, and turns line ends in what is opened without
_PIECE_BYTES = 1 << 26


def storage_error(error: OSError, path: Path) -> StorageError:
    """Returns the one-line error for a failed write at `path`."""
    if error.errno in _FULL:
        return StorageError(f"{path}: the disk is full: free space, then run the same command again")
    if error.errno in _NOT_WRITABLE:
        return StorageError(f"{path}: cannot be written ({os.strerror(error.errno or 0)}): choose a writable folder")
    if error.errno == errno.EISDIR:
        return StorageError(f"{path}: is a folder, and a file is to be written: name a file")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        lead = (*reversed(path.parents), path)
        in_the_way = next((part for part in lead if part.is_file() or (part.is_symlink() and not part.exists())), path)
        what = "a link to nowhere" if in_the_way.is_symlink() and not in_the_way.exists() else "a file, not a folder"
        return StorageError(f"{path}: {in_the_way} is {what}: choose another place")
    return StorageError(f"{path}: writing failed ({error.strerror or error})")


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


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable, where the system can open a folder at all."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(handle: IO[bytes]) -> None:
    """Flushes a file's content to the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def followed(path: Path) -> Path:
    """Returns where a file that the user named is to be written: behind a link, what it leads to, there yet or not.

    A folder is returned as it is. Raises StorageError for a link in a circle or to a write-protected file, as DVC and
    git-annex keep them, and for a pipe, device or socket.
    """
    with storage_errors(path):
        _refuse_what_is_no_file(path)
        if not path.is_symlink():
            return path
        target = Path(os.path.realpath(path))
        if target.is_file() and not target.stat().st_mode & _ANY_WRITE:
            raise StorageError(
                f"{path}: is a link to {target}, which is write-protected: choose another name, or make it a file of "
                "its own (`dvc unprotect`, `git annex unlock`)"
            )
        return target


def _own_place(path: Path) -> Path:
    """Returns what a write under a name of ours replaces. Raises StorageError as `followed`, and for a link outside."""
    place = followed(path)
    if place != path and not place.is_relative_to(os.path.realpath(path.parent)):
        raise StorageError(f"{path}: is a link that leads outside, to {place}: remove it, or choose another place")
    return place


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise StorageError(f"{path}: is a link in a circle: choose another name") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StorageError(f"{path}: is a pipe, device or socket, and a file is to be written: choose another name")


@contextlib.contextmanager
def atomic_file(path: Path, *, temporary_in: Path | None = None) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces `path` when the block ends well, and vanishes when it does not.

    A link is followed within its folder. With `temporary_in`, a folder on the file system of `path`, a link itself is
    replaced: DVC may have put one there, to what it keeps. Raises StorageError.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_what_is_no_file(path)
        place = path if temporary_in else _own_place(path)
        temporary = temporary_name(temporary_in or place.parent)
        try:
            with open(temporary, "xb") as handle:
                yield handle
                sync_file(handle)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(place.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that gets the name `path` when the block ends well, and vanishes when it does not.

    Nothing of that name is replaced. Raises StorageError.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path.parent)
        try:
            temporary.mkdir()
            yield temporary
            temporary.rename(path)
        finally:
            remove_tree(temporary)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder so that it is there whole or not at all under its name, whenever this is cut short.

    Raises StorageError.
    """
    with storage_errors(path):
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        doomed = temporary_name(path.parent)
        path.rename(doomed)
        remove_tree(doomed)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file of ours for a process to add to, and makes it where it is missing. Raises StorageError."""
    with storage_errors(path), open(_own_place(path), "ab", opener=_open_without_waiting) as file:
        yield file


def append_text(path: Path, text: str) -> None:
    """Adds text to a file of ours, which is made where it is missing. Raises StorageError."""
    with appending(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` atomically. Raises StorageError."""
    with atomic_file(path) as handle:
        handle.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8 with Unix line ends, atomically. Raises StorageError.

    Names of files that are no UTF-8, which Python has as lone surrogates, are written as the bytes that they are.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: object) -> None:
    """Replaces `path` by indented JSON with sorted keys, atomically. Raises StorageError."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Locks a file for this process until the block ends or the process dies; yields whether nobody else holds it.

    The file says who holds it, for `lock_holder`. Processes that this one forks do not hold the lock, so that they may
    outlive it. Yields True also where the system or the file system has no locks. Raises StorageError.
    """
    make_folder(path.parent)
    with storage_errors(path):
        _refuse_what_is_no_file(path)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_WAIT | _NO_FOLLOW, 0o666)
    _lock_handles.add(handle)
    try:
        is_free = fcntl is None or _locked(handle)
        if is_free:
            with storage_errors(path):
                os.ftruncate(handle, 0)
                os.write(handle, process_mark().encode())
        yield is_free
    finally:
        if handle in _lock_handles:
            _lock_handles.remove(handle)
            os.close(handle)


def lock_holder(path: Path) -> str:
    """Returns the mark of the living process that holds a lock or died with it, "" where none does."""
    try:
        with open_regular(path) as file:
            mark = file.read(200).decode("ascii", "replace")
    except OSError:
        return ""
    return mark if living_pid(mark) is not None else ""


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


def open_handle(path: Path) -> int:
    """Opens a file for `read_at`, a pipe without waiting for it, and returns its handle. Raises OSError."""
    return os.open(path, os.O_RDONLY | _NO_WAIT | _AS_IT_IS)


def read_at(handle: int, buffer: memoryview, offset: int) -> int:
    """Fills a buffer of bytes from an offset of a file and returns how many came: 0 at its end. Raises OSError.

    Threads may share the handle: preadv moves no position, and where there is none, reading takes turns.
    """
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], offset)
    with _turn:
        os.lseek(handle, offset, os.SEEK_SET)
        data = os.read(handle, min(len(buffer), _PIECE_BYTES))
    buffer[: len(data)] = data
    return len(data)


_turn = threading.Lock()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAIT, 0o666)  # opening a pipe waits for its other end otherwise


def nearest_path(path: Path) -> str:
    """Returns ' (did you mean X?)' for what lies beside a missing path and has the nearest name, or nothing.

    Of a link that leads nowhere, and of a path as TOML makes it of Windows' backslashes between double quotes, says
    what happened to it.
    """
    if any(escaped in str(path) for escaped in "\b\t\n\f\r"):
        return " (a backslash begins an escape between double quotes: write /, or put the path into single quotes)"
    try:
        if path.is_symlink():
            return f" (it is a link to {os.path.realpath(path)})"
        names = {other.name.casefold(): other.name for other in path.parent.iterdir()}
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name.casefold(), names, n=1, cutoff=0.8)
    return f" (did you mean {path.parent / names[matches[0]]}?)" if matches else ""


def free_bytes(path: Path) -> int:
    """Returns the free space of the file system that `path`, or its nearest existing parent, lies on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
