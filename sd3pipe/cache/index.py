"""The index: for every row its segment, place, layout and digest, in columns that open at once."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from sd3pipe.cache.keys import Kind
from sd3pipe.cache.rows import Layout, layout_bytes, layout_to_json
from sd3pipe.cache.samples import Samples, array_shapes, as_text, check_samples, hash_array
from sd3pipe.cache.segment import SegmentHeader
from sd3pipe.cache.zarr_group import ReadFile, arrays_hash, read_array
from sd3pipe.documents import parse_json
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import canonical_json

_ROW_ARRAYS = {
    "row_key": ("uint8", 2), "row_segment": ("uint32", 1), "row_offset": ("uint64", 1), "row_bytes": ("uint64", 1),
    "row_layout": ("uint32", 1), "row_digest": ("uint8", 2),
}  # fmt: skip
_OTHER_ARRAYS = {"segment_id": ("uint8", 2), "segment_bytes": ("uint64", 1), "layouts": ("uint8", 1)}
_MOST_ROW_BYTES = 2**63
_LAYOUTS = TypeAdapter(list[Layout])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """The rows of some segments in columns, in any order; `segments` maps each plan id to its file's size."""

    keys: np.ndarray  # uint8 [rows, 32]
    digests: np.ndarray  # uint8 [rows, 32]
    offsets: np.ndarray  # uint64, from the start of the file
    sizes: np.ndarray  # uint64
    segment_of: Sequence[str] | np.ndarray  # plan id of each row
    layout_of: Sequence[bytes] | np.ndarray  # canonical JSON of each row's layout
    segments: Mapping[str, int]


class Index:
    """An index's arrays. Rows are sorted by key, so that a row's number is found by bisection.

    Raises ValueError or InputError for arrays that do not belong together.
    """

    def __init__(self, kind: Kind, arrays: Mapping[str, np.ndarray]) -> None:
        self.kind: Kind = kind
        self.arrays = arrays
        self.samples = Samples(kind, arrays)
        self.layouts: list[Layout] = parse_json(arrays["layouts"].tobytes(), _LAYOUTS, "layouts")
        for name, (dtype, axes) in _formats(kind).items():  # all arrays of two axes hold hashes
            array = arrays[name]
            if array.dtype != dtype or array.ndim != axes or (axes == 2 and array.shape[1] != 32):
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        self._sorted_keys = as_text(arrays["row_key"])
        _check_rows(arrays, self._sorted_keys, self.layouts)
        check_samples(kind, arrays, len(self._sorted_keys))

    def __len__(self) -> int:
        return len(self.arrays["row_key"])

    def number(self, key: str) -> int | None:
        """Returns the row number of a key, None if the cache has no such row."""
        wanted = bytes.fromhex(key)
        place = int(np.searchsorted(self._sorted_keys, np.array([wanted], "S32"))[0])
        return place if place < len(self) and self.arrays["row_key"][place].tobytes() == wanted else None

    def plan_ids(self) -> list[str]:
        """Returns the ids of the segments, by number."""
        return [item.tobytes().hex() for item in self.arrays["segment_id"]]

    def segments(self) -> dict[str, int]:
        """Returns plan id and file size of every segment."""
        return dict(zip(self.plan_ids(), self.arrays["segment_bytes"].tolist(), strict=True))

    def row_table(self, plan_ids: Collection[str]) -> RowTable:
        """Returns the rows of some of the segments."""
        names = np.array(self.plan_ids(), dtype=object)
        wanted = np.fromiter((name in plan_ids for name in names), bool, len(names))
        kept = wanted[self.arrays["row_segment"]]
        texts = np.array([canonical_json(layout_to_json(layout)) for layout in self.layouts], dtype=object)
        sizes = self.segments()
        return RowTable(
            keys=self.arrays["row_key"][kept],
            digests=self.arrays["row_digest"][kept],
            offsets=self.arrays["row_offset"][kept],
            sizes=self.arrays["row_bytes"][kept],
            segment_of=names[self.arrays["row_segment"][kept]],
            layout_of=texts[self.arrays["row_layout"][kept]] if len(texts) else [],
            segments={plan_id: sizes[plan_id] for plan_id in plan_ids if plan_id in sizes},
        )


def header_table(headers: Mapping[str, SegmentHeader]) -> RowTable:
    """Returns the rows of segments known by their headers."""
    rows = [(plan_id, *row) for plan_id, header in headers.items() for row in header.placed_rows()]
    return RowTable(
        keys=hash_array([info.key for _, info, _, _ in rows]),
        digests=np.frombuffer(b"".join(info.digest for _, info, _, _ in rows), np.uint8).reshape(-1, 32),
        offsets=np.array([start for _, _, start, _ in rows], np.uint64),
        sizes=np.array([size for _, _, _, size in rows], np.uint64),
        segment_of=[plan_id for plan_id, _, _, _ in rows],
        layout_of=[canonical_json(layout_to_json(info.layout)) for _, info, _, _ in rows],
        segments={plan_id: header.file_bytes for plan_id, header in headers.items()},
    )


def build_row_arrays(tables: Iterable[RowTable]) -> dict[str, np.ndarray]:
    """Returns the index's arrays for the rows of all tables: a pure function of the set of rows."""
    parts = list(tables)
    sizes = {plan_id: size for table in parts for plan_id, size in table.segments.items()}
    plan_ids, segment_codes = _codes([text for table in parts for text in table.segment_of])
    layouts, layout_codes = _codes([text for table in parts for text in table.layout_of])
    keys = np.concatenate([table.keys for table in parts])
    order = np.argsort(as_text(keys), kind="stable")
    return {
        "row_key": keys[order],
        "row_segment": segment_codes[order],
        "row_offset": np.concatenate([table.offsets for table in parts])[order].astype(np.uint64),
        "row_bytes": np.concatenate([table.sizes for table in parts])[order].astype(np.uint64),
        "row_layout": layout_codes[order],
        "row_digest": np.concatenate([table.digests for table in parts])[order],
        "segment_id": hash_array(plan_ids),
        "segment_bytes": np.array([sizes[plan_id] for plan_id in plan_ids], np.uint64),
        "layouts": np.frombuffer(b"[" + b",".join(layouts) + b"]", np.uint8),
    }


def read_index(kind: Kind, digest: str, read: ReadFile, where: str) -> Index:
    """Returns an index, checked against the hash that names it. Raises InputError."""
    arrays = {name: read_array(read, name, where) for name in _formats(kind)}
    if arrays_hash(arrays) != digest:
        raise InputError(
            f"{where}: the index does not have the hash in its name: run `sd3pipe cache verify --repair`, then encode"
        )
    try:
        return Index(kind, arrays)
    except (ValueError, InputError) as error:
        raise InputError(
            f"{where}: the index cannot be understood ({error}): run `sd3pipe cache verify --repair`, then encode"
        ) from error


def _formats(kind: Kind) -> dict[str, tuple[str, int]]:
    return {**_ROW_ARRAYS, **_OTHER_ARRAYS, **array_shapes(kind)}


def _check_rows(arrays: Mapping[str, np.ndarray], keys: np.ndarray, layouts: Sequence[Layout]) -> None:
    """Raises ValueError for rows out of order, outside of their segments or of another size than their layout."""
    segments, sizes = arrays["row_segment"], arrays["row_bytes"]
    if any(len(arrays[name]) != len(keys) for name in _ROW_ARRAYS):
        raise ValueError("its columns differ in length")
    if len(arrays["segment_id"]) != len(arrays["segment_bytes"]):
        raise ValueError("its segments differ in number")
    if not len(keys):
        return
    if np.any(keys[1:] <= keys[:-1]):
        raise ValueError("its keys are not ascending")
    if int(segments.max()) >= len(arrays["segment_id"]) or int(arrays["row_layout"].max()) >= len(layouts):
        raise ValueError("a row names a segment or layout that is not there")
    ends = arrays["segment_bytes"][segments]
    if np.any(arrays["row_offset"] > ends) or np.any(sizes > ends - arrays["row_offset"]):
        raise ValueError("a row lies outside of its segment")
    expected = np.array([min(layout_bytes(layout), _MOST_ROW_BYTES) for layout in layouts], np.uint64)
    if not np.array_equal(expected[arrays["row_layout"]], sizes):
        raise ValueError("a row's size does not fit its layout")


def _codes(texts: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Returns the distinct values, sorted, and each value's number among them."""
    distinct = sorted(set(texts))
    numbers = {text: number for number, text in enumerate(distinct)}
    return distinct, np.fromiter((numbers[text] for text in texts), np.uint32, len(texts))
