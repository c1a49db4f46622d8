"""Where a picture's bytes lie: in a file of their own, or in a part of one; on a disk, or behind an address."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sd3pipe.errors import InputError, NetworkError, UnreadablePicture
from sd3pipe.file_stamps import Stamp, stamp_of
from sd3pipe.files import open_regular
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.remote import Remote, open_file, read_range, stamp_of_file

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

MAX_FILE_BYTES = 1_000_000_000  # 200 megapixels in four bytes each, and room for what a camera adds


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes in a row in a file: a member of a tar, a value of an Arrow table."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A value of a column of a Parquet file, such as image.bytes, in a row of a row group."""

    group: int
    row: int
    column: str


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one picture. `label` is what its part of the file is called: a member's name, or the row."""

    file: Path | Remote
    label: str = ""
    part: Span | ParquetCell | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.label}" if self.part else str(self.file)

    @property
    def suffix(self) -> str:
        """The ending of the picture's own name."""
        return Path(self.label).suffix if self.part else self.file.suffix

    @property
    def stem(self) -> str:
        """The picture's own name without its ending and without folders."""
        return Path(self.label if self.part else self.file.name).stem

    @property
    def own_file(self) -> Path | None:
        """The file on this machine that holds this picture alone; None where there is none."""
        return self.file if isinstance(self.file, Path) and self.part is None else None


def read_picture(place: Path | Place, most_bytes: int | None = None) -> bytes:
    """Returns the bytes of a picture, of bounded size, from a regular file. Raises UnreadablePicture."""
    place = Place(place) if isinstance(place, Path) else place
    most_bytes = most_bytes or MAX_FILE_BYTES
    try:
        data = _read(place, most_bytes)
    except (OSError, InputError, NetworkError) as error:
        raise UnreadablePicture(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(data) > most_bytes:
        raise UnreadablePicture(too_large(most_bytes))
    return data


def read_unchanged(place: Place, expected_hash: str, *, while_it: str, ahead: bytes | None = None) -> bytes:
    """Returns the bytes of a picture, `ahead` if they were read already, if they are still those of the scan.

    Raises UnreadablePicture.
    """
    data = read_picture(place) if ahead is None else ahead
    if hash_bytes(data) != expected_hash:
        raise UnreadablePicture(f"it changed while {while_it}: run again")
    return data


def too_large(most_bytes: int) -> str:
    """Returns why a picture of more bytes is not read."""
    return f"the file is larger than {most_bytes:,} bytes"


def _read(place: Place, most_bytes: int) -> bytes:
    """Returns a picture's bytes, or the first of them where they are too many. Raises InputError, OSError."""
    if isinstance(place.part, ParquetCell):
        file, cell = place.file, place.part
        stamp = stamp_of_file(file) if isinstance(file, Remote) else stamp_of(file.stat())
        try:
            return cell_bytes(_column(file, stamp, cell.group, cell.column)[cell.row])
        except (IndexError, ValueError, KeyError) as error:
            raise InputError(f"{file}: has no row {cell.row} in its row group {cell.group} any more") from error
    start, size = (place.part.start, place.part.size) if place.part else (0, most_bytes + 1)
    size = min(size, most_bytes + 1)
    if isinstance(place.file, Remote):
        return read_range(place.file, start, size)
    with open_regular(place.file) as file:
        if place.part is None and os.fstat(file.fileno()).st_size > most_bytes:
            raise UnreadablePicture(too_large(most_bytes))
        file.seek(start)
        return file.read(size)


def open_container(file: Path | Remote) -> BinaryIO:
    """Returns a file that holds several pictures, open for reading. Raises OSError."""
    return open_file(file) if isinstance(file, Remote) else open_regular(file)


def pyarrow_for(file: Path | Remote) -> Any:
    """Returns pyarrow. Raises InputError where it is not installed."""
    try:
        import pyarrow  # an extra's
    except ImportError as error:
        raise InputError(f'{file}: needs pyarrow: pip install "sd3pipe[parquet]"') from error
    return pyarrow


def open_parquet(handle: BinaryIO, file: Path | Remote) -> Any:
    """Returns a pyarrow.parquet.ParquetFile of an open file. Raises InputError, OSError."""
    pyarrow = pyarrow_for(file)
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(handle)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: cannot be read as Parquet ({' '.join(str(error).split())})") from error


def cell_bytes(scalar: Any) -> bytes:
    """Returns the bytes of a value of a column of pictures; of image.bytes, a {bytes} record."""
    value = scalar.as_py()
    return (next(iter(value.values())) if isinstance(value, dict) else value) or b""


@functools.lru_cache(maxsize=1)  # rows in their order come from one row group after the other
def _column(file: Path | Remote, stamp: Stamp, group: int, column: str) -> "ChunkedArray":
    """Returns the column of a row group of the file that has this stamp; of image.bytes, {bytes} records.

    Pages are packed: to read one value, its row group's column is read.
    """
    return open_parquet(open_container(file), file).read_row_group(group, columns=[column]).column(0)
