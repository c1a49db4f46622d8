"""Single values of a Parquet file, whose pages are packed: to read one, its row group's column is read."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import Stamp, stamp_of
from sd3pipe.files import open_regular
from sd3pipe.remote import Remote, open_file, stamp_of_file

if TYPE_CHECKING:
    from pyarrow import ChunkedArray


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a column such as image.bytes, in a row of a row group."""

    group: int
    row: int
    column: str


def pyarrow_for(file: Path | Remote) -> Any:
    """Returns pyarrow. Raises InputError where it is not installed."""
    try:
        import pyarrow  # an extra's
    except ImportError as error:
        raise InputError(f"{file}: needs pyarrow: pip install 'sd3pipe[parquet]'") from error
    return pyarrow


def open_parquet(file: Path | Remote) -> Any:
    """Returns a pyarrow.parquet.ParquetFile. Raises InputError, OSError."""
    pyarrow = pyarrow_for(file)
    from pyarrow.parquet import ParquetFile

    handle = open_file(file) if isinstance(file, Remote) else open_regular(file)
    try:
        return ParquetFile(handle)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: cannot be read as Parquet ({' '.join(str(error).split())})") from error


def read_cell(file: Path | Remote, cell: Cell) -> bytes:
    """Returns a value's bytes. Raises InputError, OSError."""
    stamp = stamp_of_file(file) if isinstance(file, Remote) else stamp_of(file.stat())
    try:
        value = _column(file, stamp, cell.group, cell.column)[cell.row].as_py()
    except (IndexError, ValueError, KeyError) as error:
        raise InputError(f"{file}: has no row {cell.row} in its row group {cell.group} any more") from error
    return (next(iter(value.values())) if isinstance(value, dict) else value) or b""


@functools.lru_cache(maxsize=1)  # rows in their order come from one row group after the other
def _column(file: Path | Remote, stamp: Stamp, group: int, column: str) -> "ChunkedArray":
    """Returns the column of a row group of the file that has this stamp; of image.bytes, {bytes} records."""
    return open_parquet(file).read_row_group(group, columns=[column]).column(0)
