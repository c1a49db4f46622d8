"""Pictures of Parquet files, read ahead in their files' order.

Rows are made in the order of their keys, which is random in a file; and of Parquet nothing less than a row group's
column can be unpacked. So as many pictures as memory allows are read in one pass, each group once for all of them.
"""

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3pipe import stopping
from sd3pipe.data.places import MAX_FILE_BYTES, ParquetCell, Place, cell_bytes, open_container, open_parquet
from sd3pipe.errors import InputError, NetworkError
from sd3pipe.remote import Remote

AHEAD_BYTES = 512 << 20  # of pictures that were read and not yet asked for, about
_ROWS_AT_ONCE = 16  # that are unpacked


def read_ahead(places: Sequence[Place]) -> Iterator[bytes | None]:
    """Yields, for each place in order, the bytes of a picture in a Parquet file, or None: read it at its place.

    None is for other files, for a picture alone, and where reading fails, so that who reads it there says why.
    """
    row_bytes = functools.cache(_row_bytes)
    start = held = 0
    for number, place in enumerate(places):
        if not isinstance(place.part, ParquetCell):
            if start == number:  # nothing waits
                yield None
                start = number + 1
            continue
        size = row_bytes(place.file).get(place.part.group, 0)
        if held + size > AHEAD_BYTES and start < number:
            yield from _read(places[start:number])
            start, held = number, 0
        held += size
    yield from _read(places[start:])


def _row_bytes(file: Path | Remote) -> dict[int, int]:
    """Returns the mean size of a row of each row group; none where they cannot be read."""
    with contextlib.suppress(OSError, ValueError, InputError, NetworkError), open_container(file) as handle:
        metadata = open_parquet(handle, file).metadata
        groups = {number: metadata.row_group(number) for number in range(metadata.num_row_groups)}
        return {number: group.total_byte_size // max(group.num_rows, 1) for number, group in groups.items()}
    return {}


def _read(places: Sequence[Place]) -> list[bytes | None]:
    """Returns the pictures at these places, each row group unpacked once."""
    if len(places) == 1:
        return [None]
    found: dict[int, bytes] = {}
    asked: dict[Path | Remote, dict[tuple[int, str], dict[int, list[int]]]] = {}
    for number, place in enumerate(places):
        if isinstance(cell := place.part, ParquetCell):
            rows = asked.setdefault(place.file, {}).setdefault((cell.group, cell.column), defaultdict(list))
            rows[cell.row].append(number)
    for file, groups in asked.items():
        with (
            contextlib.suppress(OSError, ValueError, IndexError, KeyError, InputError, NetworkError),
            open_container(file) as handle,
        ):
            parquet = open_parquet(handle, file)
            for (group, column), numbers in sorted(groups.items()):
                stopping.check()
                row = itertools.count()
                for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        wanted = numbers.get(next(row), ())
                        if wanted and len(data := cell_bytes(value)) <= MAX_FILE_BYTES:
                            found.update(dict.fromkeys(wanted, data))
    return [found.get(number) for number in range(len(places))]
