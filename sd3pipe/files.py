"""Files that are never half there. The only module that relies on link(2), flock or fsync of a folder."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sd3pipe.errors import StorageError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EACCES}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def storage_error(error: OSError, path: Path) -> StorageError:
    """Returns the one-line error for a failed write at `path`."""
    if error.errno in _FULL:
        return StorageError(f"{path}: the disk is full: free space, then run the same command again")
    if error.errno in _NOT_WRITABLE:
        return StorageError(f"{path}: cannot be written ({os.strerror(error.errno or 0)}): choose a writable folder")
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
    """Replaces `path` by `text` in UTF-8 with Unix line ends, atomically. Raises StorageError."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by indented JSON with sorted keys, atomically. Raises StorageError."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


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


def free_bytes(path: Path) -> int:
    """Returns the free space of the file system that `path`, or its nearest existing parent, lies on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
