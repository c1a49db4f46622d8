"""The index: for every row its segment, place, layout and digest, in columns that open at once."""

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe.cache.keys import Kind
from sd3pipe.cache.rows import Layout, layout_from_json, layout_to_json
from sd3pipe.cache.samples import COLUMNS, Samples, hash_array, row_column
from sd3pipe.cache.segment import SegmentHeader
from sd3pipe.cache.zarr_group import ReadFile, arrays_hash, read_array, write_group
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import canonical_json

_ROW_ARRAYS = ("row_key", "row_segment", "row_offset", "row_bytes", "row_layout", "row_digest")
_OTHER_ARRAYS = ("segment_id", "segment_bytes", "layouts")


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
    """An index's arrays. Rows are sorted by key, so that a row's number is found by bisection."""

    def __init__(self, kind: Kind, arrays: Mapping[str, np.ndarray]) -> None:
        self.kind: Kind = kind
        self.arrays = arrays
        self.samples = Samples(kind, arrays)
        self.layouts: list[Layout] = [layout_from_json(item) for item in json.loads(arrays["layouts"].tobytes())]
        self._sorted_keys = np.ascontiguousarray(arrays["row_key"]).view("S32").reshape(-1)

    def __len__(self) -> int:
        return len(self.arrays["row_key"])

    def digest(self) -> str:
        """Returns the hash that names the index."""
        return arrays_hash(self.arrays)

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

    def write(self, folder: Path) -> None:
        """Writes the index as a new zarr group. Raises OSError."""
        write_group(folder, self.arrays)


def header_table(headers: Mapping[str, SegmentHeader]) -> RowTable:
    """Returns the rows of segments known by their headers."""
    rows = [
        (plan_id, info, start, end - start)
        for plan_id, header in headers.items()
        for info, start, end in zip(header.rows, header.offsets[:-1], header.offsets[1:], strict=True)
    ]
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
    order = np.argsort(np.ascontiguousarray(keys).view("S32").reshape(-1), kind="stable")
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


def read_index(kind: Kind, digest: str, read: ReadFile, where: str, *, check: bool = True) -> Index:
    """Returns an index, checked against the hash that names it. Raises InputError."""
    names = [*_ROW_ARRAYS, *_OTHER_ARRAYS, *_sample_array_names(kind)]
    arrays = {name: read_array(read, name, where) for name in names}
    if check and arrays_hash(arrays) != digest:
        raise InputError(
            f"{where}: the index does not have the hash in its name: run `sd3pipe cache verify --repair`, then encode"
        )
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return Index(kind, arrays)
    raise InputError(f"{where}: the index cannot be understood: run `sd3pipe cache verify --repair`, then encode")


def _codes(texts: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Returns the distinct values, sorted, and each value's number among them."""
    distinct = sorted(set(texts))
    numbers = {text: number for number, text in enumerate(distinct)}
    return distinct, np.fromiter((numbers[text] for text in texts), np.uint32, len(texts))


def _sample_array_names(kind: Kind) -> list[str]:
    names = []
    for name, column in COLUMNS[kind].items():
        if column == "text":
            names += [f"sample_{name}_bytes", f"sample_{name}_ends"]
            names += [f"sample_{name}_code"] if name in ("subset", "split") else []
        else:
            names.append(f"sample_{row_column(name) if column == 'row' else name}")
    return names
