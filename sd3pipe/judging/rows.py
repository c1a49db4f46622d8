"""Rows of results on the disk: computed once, whoever asks again. Segments as caches have them, without an index.

Each batch of rows becomes one immutable segment, so a process that is killed loses the batch at work, several
processes may add to one folder, and each row carries its digest and what its key is made of.
"""

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.keys import Ingredients, Kind
from sd3pipe.cache.plan import plan_id
from sd3pipe.cache.reusable import ReusableRows
from sd3pipe.cache.rows import from_numpy, layout_of, row_from_bytes
from sd3pipe.cache.segment import RowInfo, StoredRow, write_segment
from sd3pipe.cache.writers import writing
from sd3pipe.console import version
from sd3pipe.fingerprint import hash_chunks, hash_json

_VALUES = "values"
_GROUP = "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultKey:
    """What a row of results is made from: its source (any JSON), and what many rows share."""

    kind: Kind
    source: str
    ingredients: Ingredients

    @property
    def key(self) -> str:
        return self.ingredients.key(self.kind, self.source)


def result_key(kind: Kind, source: object, ingredients: Ingredients) -> ResultKey:
    """Returns the key of a row whose source is any JSON value."""
    return ResultKey(kind=kind, source=hash_json(source), ingredients=ingredients)


class ResultRows:
    """The rows of one kind in a folder."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = CacheFolder(folder)
        self._kind: Kind = kind
        self._known: dict[str, NDArray[np.float32]] = {}
        self._stored = ReusableRows(self._folder, kind, ())

    def missing(self, keys: Iterable[ResultKey]) -> list[ResultKey]:
        """Returns those of the keys, each once, whose rows are not there or damaged."""
        return [item for key, item in {item.key: item for item in keys}.items() if self._read(key) is None]

    def values(self, key: ResultKey) -> NDArray[np.float32]:
        """Returns a row that is there."""
        found = self._read(key.key)
        assert found is not None, f"row {key.key} is missing"
        return found

    def add(self, batches: Iterable[Sequence[tuple[ResultKey, NDArray[np.float32]]]]) -> int:
        """Writes each batch as it comes, and returns how many rows were written. Raises StorageError."""
        added = 0
        self._folder.create()
        with writing(self._folder, self._kind) as scratch:
            for batch in batches:
                rows = [_stored(key, values) for key, values in batch]
                name = plan_id(self._kind, [row.info.key for row in rows])
                path = self._folder.segment(name)
                write_segment(path, kind=self._kind, group=_GROUP, nbytes=0, rows=rows, scratch=scratch)
                self._known |= {key.key: values for key, values in batch}
                added += len(rows)
        return added

    def look_again(self) -> None:
        """Takes notice of what other processes have added."""
        self._stored = ReusableRows(self._folder, self._kind, ())

    def _read(self, key: str) -> NDArray[np.float32] | None:
        if key not in self._known and key in self._stored and (taken := self._stored.take(key)) is not None:
            row, _ = taken
            data = memoryview(b"".join(row.buffers))
            self._known[key] = row_from_bytes(row.info.layout, data)[_VALUES].numpy()
        return self._known.get(key)


def in_batches(
    rows: Iterator[tuple[ResultKey, NDArray[np.float32]]], size: int
) -> Iterator[Sequence[tuple[ResultKey, NDArray[np.float32]]]]:
    """Yields rows in lists of `size`; the last may be shorter, and what came before an exception is yielded first."""
    batch: list[tuple[ResultKey, NDArray[np.float32]]] = []
    try:
        for item in rows:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _stored(key: ResultKey, values: NDArray[np.float32]) -> StoredRow:
    row = {_VALUES: from_numpy(np.ascontiguousarray(values, dtype=np.float32))}
    buffers = [memoryview(row[_VALUES].data).cast("B")]
    info = RowInfo(
        key=key.key,
        layout=layout_of(row),
        digest=bytes.fromhex(hash_chunks(buffers)),
        source=key.source,
        ingredients=key.ingredients,
        made_with=f"sd3pipe {version()}, torch {importlib.metadata.version('torch')}",
    )
    return StoredRow(info, buffers)
