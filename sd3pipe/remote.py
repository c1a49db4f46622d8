"""Files behind an address such as s3://bucket/pictures, read in place through fsspec."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from sd3pipe.errors import InputError, NetworkError
from sd3pipe.fingerprint import digest_bytes

Stamp = tuple[int, int, int, int, int]  # as a file's: size, time of change, ETag
_AT_ONCE = 16  # files asked for together: their latencies overlap, their bytes are held


@dataclass(frozen=True, slots=True)
class Remote:
    """A file or a prefix behind an address; what is said of a path here is said in its words."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        base, dot, ending = self.name.rpartition(".")
        return dot + ending if base else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A file below a prefix: its path from there, and what changes whenever its content does."""

    file: Remote
    name: str
    stamp: Stamp


def is_address(text: str) -> bool:
    """Whether a text names a place behind a network protocol, not a path."""
    return "://" in text


def connect(url: str, options: dict[str, Any] | None = None) -> Any:
    """Returns a fresh file system object: the cached ones of a parent process hang in a forked one.

    Raises InputError where what an address needs is not installed.
    """
    try:
        import fsspec  # only for addresses
    except ImportError as error:
        raise InputError(f"{url} needs fsspec: pip install 'sd3pipe[s3]'") from error
    try:
        return fsspec.filesystem(url.partition("://")[0], skip_instance_cache=True, **(options or {}))
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be opened ({error}): pip install 'sd3pipe[s3]'") from error


def listing(prefix: Remote, *, recursive: bool) -> list[Listed]:
    """Returns the files below a prefix. Raises InputError where there is none, NetworkError."""
    top = _bare(prefix) + "/"
    with _told_of(prefix):
        found = _files(prefix).find(prefix.url, detail=True, maxdepth=None if recursive else 1)
    files = [
        Listed(file=Remote(f"{_protocol(prefix)}{path}"), name=path.removeprefix(top), stamp=_stamp(info))
        for path, info in sorted(found.items())
        if path.startswith(top) and info["type"] == "file" and not path.endswith("/")
    ]
    if not files:
        raise InputError(f"{prefix}: nothing lies below this address")
    return files


def stamp_of_file(file: Remote) -> Stamp:
    """Returns what changes whenever a file's content does. Raises InputError, NetworkError."""
    with _told_of(file):
        return _stamp(_files(file).info(file.url))


def open_file(file: Remote) -> BinaryIO:
    """Opens a file to be read from its start to its end, a block ahead. Raises InputError, NetworkError."""
    with _told_of(file):
        return _files(file).open(file.url, "rb", cache_type="readahead")


def read_range(file: Remote, start: int, size: int) -> bytes:
    """Returns `size` bytes, fewer at the file's end. Raises OSError."""
    try:
        return _files(file).cat_file(file.url, start=start, end=start + size)
    except _errors() as error:
        raise OSError(str(error)) from error


def read_several(files: Sequence[Remote]) -> Iterator[bytes | OSError]:
    """Yields the content of each file, or why it cannot be read, in their order."""
    for start in range(0, len(files), _AT_ONCE):
        batch = files[start : start + _AT_ONCE]
        found = _files(batch[0]).cat([file.url for file in batch], on_error="return")
        for file in batch:
            item = found[_bare(file)] if isinstance(found, dict) else found
            if isinstance(item, _errors()):
                yield OSError(str(item))
            elif isinstance(item, Exception):
                raise item
            else:
                yield item


def _files(place: Remote) -> Any:
    return _connected(_protocol(place), os.getpid())


@functools.lru_cache(maxsize=8)
def _connected(protocol: str, process: int) -> Any:
    return connect(protocol, {"use_listings_cache": False})


def _protocol(place: Remote) -> str:
    return place.url[: place.url.index("://") + 3]


def _bare(place: Remote) -> str:
    return place.url.partition("://")[2].rstrip("/")


def _stamp(info: dict[str, Any]) -> Stamp:
    """Returns size, time of change and ETag in the form of a file's stamp."""
    changed = info.get("LastModified")
    when = int(changed.timestamp() * 1e9) if changed is not None else 0
    tag = int.from_bytes(digest_bytes(str(info.get("ETag")).encode())[:7], "big")
    return int(info["size"] or 0), when, tag, 0, 0


def _errors() -> tuple[type[Exception], ...]:
    """Returns how failures of a network file system speak."""
    try:
        from botocore.exceptions import BotoCoreError  # installed with s3fs
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError)


@contextlib.contextmanager
def _told_of(place: Remote) -> Iterator[None]:
    """Turns a failure of the block into an InputError or a NetworkError that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{place}: there is no such file or prefix") from error
    except _errors() as error:
        raise NetworkError(f"{place} cannot be read: {error}") from error
