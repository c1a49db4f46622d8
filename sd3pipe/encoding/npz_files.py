"""Reads the .npz files in which sd-scripts keeps latents and text encoder outputs. Nothing in them is unpickled."""

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_DTYPES = ("float32", "float16")
_HEADER_BYTES = 4096  # a .npy header takes 128
_ERRORS = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, MemoryError)

Shape = tuple[int, ...]


class NotProved(Exception):
    """A row cannot be taken over; the message is the reason."""


class NpzFile:
    """The arrays of one file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._sizes()

    def numbers(self, name: str, shape: Shape) -> np.ndarray:
        """Returns a finite array of this shape, float32 or float16. Raises NotProved for anything else."""
        array = self._read(name, 4 * math.prod(shape))
        if array.dtype.name not in _DTYPES or array.shape != shape:
            raise NotProved(f"{name} is {array.dtype.name} {list(array.shape)}, wanted are numbers {list(shape)}")
        if not np.isfinite(array).all():
            raise NotProved(f"{name} holds values that are not finite")
        return array

    def whole_numbers(self, name: str, length: int) -> list[int]:
        """Returns a few integers, flags among them. Raises NotProved."""
        array = self._read(name, 8 * length)
        if array.dtype.kind not in "iufb" or array.size != length:
            raise NotProved(f"{name} is {array.dtype.name} {list(array.shape)}, wanted are {length} integers")
        return [int(value) for value in array.reshape(-1).tolist()]

    def _read(self, name: str, most_bytes: int) -> np.ndarray:
        """Returns an array without unpacking more than it may have: a file may claim to be small."""
        try:
            size = self._sizes().get(f"{name}.npy")
            if size is None:
                raise NotProved(f"it has no {name}")
            if size > most_bytes + _HEADER_BYTES:
                raise NotProved(f"{name} is larger than it should be")
            with np.load(self.path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        except _ERRORS as error:
            raise NotProved(f"it cannot be read ({type(error).__name__})") from error

    def _sizes(self) -> Mapping[str, int]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {entry.filename: entry.file_size for entry in archive.infolist()}
        except FileNotFoundError as error:
            raise NotProved("there is no such file") from error
        except _ERRORS as error:
            raise NotProved(f"it cannot be read ({type(error).__name__})") from error


def check_not_older(npz: Path, sources: Sequence[Path]) -> None:
    """Raises NotProved if a file was changed after the .npz was written."""
    try:
        written = npz.stat().st_mtime_ns
    except OSError as error:
        raise NotProved(f"there is no {npz.name}") from error
    for source in sources:
        if source.stat().st_mtime_ns > written:
            raise NotProved(f"{source.suffix.removeprefix('.')} file is newer than the .npz")
