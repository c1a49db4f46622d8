"""The samples table: which picture or caption uses which row. Columns of fixed width, in sorted order."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from sd3pipe.cache.keys import Kind

Column = Literal["text", "hash", "number", "row"]
Columns = Mapping[str, Sequence[Any]]

COLUMNS: dict[Kind, dict[str, Column]] = {
    "latents": {
        "name": "text",
        "subset": "text",
        "image_hash": "hash",
        "bucket_h": "number",
        "bucket_w": "number",
        "crop": "number",
        "flip": "number",
        "original_h": "number",
        "original_w": "number",
        "split": "text",
        "key": "row",
    },
    "text": {
        "name": "text",
        "subset": "text",
        "image_hash": "hash",
        "caption_hash": "hash",
        "variant": "number",
        "key": "row",
    },
    "prompts": {
        "name": "text",
        "prompt": "text",
        "negative": "text",
        "settings": "text",
        "key": "row",
        "negative_key": "row",
    },
    "captions": {"name": "text", "subset": "text", "image_hash": "hash", "key": "row"},
}
_ORDER = ("subset", "name", "crop", "flip", "variant", "bucket_h", "bucket_w", "image_hash")
_FEW = {"subset", "split"}  # few distinct texts: stored once each, and a number per sample


class Strings:
    """Texts as bytes and ends: a million of them open without a million objects."""

    def __init__(self, data: np.ndarray, ends: np.ndarray, codes: np.ndarray | None = None) -> None:
        self._data, self._ends, self._codes = data, ends, codes

    def __len__(self) -> int:
        return len(self._ends if self._codes is None else self._codes)

    def __getitem__(self, number: int) -> str:
        place = int(number if self._codes is None else self._codes[number])
        start = int(self._ends[place - 1]) if place else 0
        return self._data[start : int(self._ends[place])].tobytes().decode("utf-8", "surrogateescape")

    def to_list(self) -> list[str]:
        if self._codes is None:
            data, ends = self._data.tobytes(), self._ends.tolist()
            return [data[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise([0, *ends])]
        texts = Strings(self._data, self._ends).to_list()
        return [texts[code] for code in self._codes]


class Samples:
    """The samples of one cache: columns by name, `row` columns as row numbers."""

    def __init__(self, kind: Kind, arrays: Mapping[str, np.ndarray]) -> None:
        self.kind: Kind = kind
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self.numbers(row_column("key")))

    def numbers(self, column: str) -> np.ndarray:
        """Returns a column of integers, "row" and "negative_row" among them."""
        return self._arrays[f"sample_{column}"]

    def hashes(self, column: str) -> np.ndarray:
        """Returns a column of hashes as uint8 [samples, 32]."""
        return self._arrays[f"sample_{column}"]

    def strings(self, column: str) -> Strings:
        """Returns a column of texts."""
        return Strings(
            self._arrays[f"sample_{column}_bytes"],
            self._arrays[f"sample_{column}_ends"],
            self._arrays[f"sample_{column}_code"] if column in _FEW else None,
        )

    def to_columns(self, keys: np.ndarray) -> dict[str, list[Any]]:
        """Returns the columns as they were passed in, sorted. `keys` are the keys of all rows, uint8 [rows, 32]."""
        columns: dict[str, list[Any]] = {}
        for name, column in COLUMNS[self.kind].items():
            if column == "text":
                columns[name] = self.strings(name).to_list()
            elif column == "hash":
                columns[name] = hex_list(self.hashes(name))
            elif column == "row":
                columns[name] = hex_list(keys[self.numbers(row_column(name))])
            else:
                columns[name] = self.numbers(name).tolist()
        return columns


def array_shapes(kind: Kind) -> dict[str, tuple[str, int]]:
    """Returns the number format and the number of axes of each array of the table."""
    shapes: dict[str, tuple[str, int]] = {}
    for name, column in COLUMNS[kind].items():
        if column == "text":
            shapes |= {f"sample_{name}_bytes": ("uint8", 1), f"sample_{name}_ends": ("uint64", 1)}
            shapes |= {f"sample_{name}_code": ("uint32", 1)} if name in _FEW else {}
        elif column == "hash":
            shapes[f"sample_{name}"] = ("uint8", 2)
        elif column == "row":
            shapes[f"sample_{row_column(name)}"] = ("uint32", 1)
        else:
            shapes[f"sample_{name}"] = ("int32", 1)
    return shapes


def check_samples(kind: Kind, arrays: Mapping[str, np.ndarray], rows: int) -> None:
    """Raises ValueError where the table's arrays, of the right formats, do not fit each other or the number of rows."""
    count = len(arrays["sample_row"])
    for name, column in COLUMNS[kind].items():
        if column == "text":
            _check_texts(name, arrays, count)
            continue
        array = arrays[f"sample_{row_column(name) if column == 'row' else name}"]
        if len(array) != count:
            raise ValueError(f"{name} has {len(array)} samples, not {count}")
        if column == "row" and count and int(array.max()) >= rows:
            raise ValueError(f"{name} names a row that is not there")
        if column == "number" and count and int(array.min()) < 0:
            raise ValueError(f"{name} is negative")


def _check_texts(name: str, arrays: Mapping[str, np.ndarray], count: int) -> None:
    ends, size = arrays[f"sample_{name}_ends"], len(arrays[f"sample_{name}_bytes"])
    if np.any(ends[1:] < ends[:-1]) or (int(ends[-1]) if len(ends) else 0) != size:
        raise ValueError(f"the texts of {name} do not lie one after the other")
    codes = arrays.get(f"sample_{name}_code")
    if len(ends if codes is None else codes) != count:
        raise ValueError(f"{name} has other samples than the table")
    if codes is not None and count and int(codes.max()) >= len(ends):
        raise ValueError(f"{name} names a text that is not there")


def row_columns(kind: Kind) -> list[str]:
    """Returns the names of the columns that name rows."""
    return [name for name, column in COLUMNS[kind].items() if column == "row"]


def row_column(key_column: str) -> str:
    """Returns the stored name of a column of keys: it holds row numbers instead."""
    return key_column.removesuffix("key") + "row"


def sample_arrays(kind: Kind, columns: Columns, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the table's arrays, sorted by subset, name, geometry and variant. `keys` are the sorted keys of all rows.

    Raises ValueError for missing or unknown columns, columns of unequal length, and keys that are no row.
    """
    check_columns(kind, columns)
    by = list(zip(*(columns[name] for name in _ORDER if name in columns), strict=True))
    order = sorted(range(len(by)), key=by.__getitem__)
    arrays: dict[str, np.ndarray] = {}
    for name, column in COLUMNS[kind].items():
        values = [columns[name][number] for number in order]
        if column == "text" and name in _FEW:
            texts = sorted(set(values))
            codes = {text: code for code, text in enumerate(texts)}
            arrays[f"sample_{name}_code"] = np.array([codes[text] for text in values], dtype=np.uint32)
            arrays |= _text_arrays(name, texts)
        elif column == "text":
            arrays |= _text_arrays(name, values)
        elif column == "hash":
            arrays[f"sample_{name}"] = hash_array(values)
        elif column == "row":
            arrays[f"sample_{row_column(name)}"] = find_keys(keys, hash_array(values))
        else:
            arrays[f"sample_{name}"] = np.array(values, dtype=np.int32)
    return arrays


def select(columns: Columns, keep: Sequence[bool]) -> dict[str, list[Any]]:
    """Returns the samples for which `keep` is true."""
    return {name: [value for value, kept in zip(values, keep, strict=True) if kept] for name, values in columns.items()}


def find_keys(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the numbers of `wanted` among sorted `keys`, both uint8 [n, 32]. Raises ValueError if one is missing."""
    if len(wanted) == 0:
        return np.zeros(0, np.uint32)
    places = np.searchsorted(as_text(keys), as_text(wanted))
    if len(keys) == 0 or not np.array_equal(keys[np.minimum(places, len(keys) - 1)], wanted):
        raise ValueError("a sample's key is the key of no row")
    return places.astype(np.uint32)


def hash_array(hashes: Sequence[str]) -> np.ndarray:
    """Returns hashes of 64 hex digits as uint8 [n, 32]. Raises ValueError for anything else."""
    data = bytes.fromhex("".join(hashes))
    if len(data) != 32 * len(hashes):
        raise ValueError("hashes have 64 hex digits")
    return np.frombuffer(data, np.uint8).reshape(-1, 32)


def hex_list(hashes: np.ndarray) -> list[str]:
    """Returns uint8 [n, 32] as texts of 64 hex digits."""
    text = np.ascontiguousarray(hashes).tobytes().hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def as_text(hashes: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 32] as n values that can be sorted and looked up."""
    return np.ascontiguousarray(hashes).view("S32").reshape(-1)


def check_columns(kind: Kind, columns: Columns) -> None:
    """Raises ValueError for missing or unknown columns, for columns of unequal length and for texts that are none."""
    if set(columns) != set(COLUMNS[kind]):
        raise ValueError(f"samples of {kind} have the columns {sorted(COLUMNS[kind])}, not {sorted(columns)}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of samples differ in length: {lengths}")
    for name, column in COLUMNS[kind].items():
        if column != "number" and not all(isinstance(value, str) for value in columns[name]):
            raise ValueError(f"{name} has values that are no texts")


def _text_arrays(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(data) for data in encoded], dtype=np.uint64)
    return {
        f"sample_{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        f"sample_{name}_ends": ends.astype(np.uint64),
    }
