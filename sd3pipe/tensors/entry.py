"""A tensor under its canonical key, as byte ranges of files. Free of torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from sd3pipe import stopping
from sd3pipe.errors import InputError
from sd3pipe.files import open_handle, read_at


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Consecutive bytes of one file; `offset` counts from the start of the file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One canonical tensor: the bytes of its ranges, one after the other, are its content in row-major order."""

    dtype: str  # as safetensors spells it: F32, BF16, F8_E4M3
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]
    scale: "TensorEntry | None" = None  # the weight is this, one number or one a row, times what is stored

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.ranges)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the tensor lies in, each once."""
        return tuple(dict.fromkeys(part.path for part in self.ranges))


class RangeReader:
    """Reads byte ranges by pread, keeping each file open. A context manager; safe to share between threads.

    Weights and fingerprints take minutes to read, so that a wish to stop ends the reading (raises Stopped) unless
    `may_stop` is False.
    """

    def __init__(self, *, may_stop: bool = True) -> None:
        self._may_stop = may_stop
        self._handles: dict[Path, int] = {}
        self._opening = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def read_bytes(self, buffer: memoryview, part: ByteRange) -> None:
        """Fills `buffer` with the first len(buffer) bytes of the range. Raises InputError if the file is too short."""
        if self._may_stop:
            stopping.check()
        handle, done = self._open(part.path), 0
        while done < len(buffer):
            try:
                count = read_at(handle, buffer[done:], part.offset + done)
            except OSError as error:
                raise InputError(f"{part.path}: reading failed ({error.strerror or error})") from error
            if not count:
                raise InputError(f"{part.path}: became shorter while it was read: copy it again")
            done += count

    def _open(self, path: Path) -> int:
        with self._opening:
            if path not in self._handles:
                try:
                    self._handles[path] = open_handle(path)
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
            return self._handles[path]


def chunks(ranges: tuple[ByteRange, ...], chunk_bytes: int) -> Iterator[ByteRange]:
    """Yields the ranges cut into pieces of at most `chunk_bytes`, in order."""
    for part in ranges:
        for start in range(0, part.nbytes, chunk_bytes):
            yield ByteRange(part.path, part.offset + start, min(chunk_bytes, part.nbytes - start))
