"""A zarr v3 group of uncompressed arrays, one chunk each, as files whose bytes depend on the arrays alone.

Written here rather than by the zarr library: its metadata differs between releases, which would give equal caches
unequal files, and importing it takes longer than checking 10,000 pictures. The tests read them with the library.
"""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from blake3 import blake3
from pydantic import Field, TypeAdapter

from sd3pipe.documents import MOST_BYTES, DocumentError, parse_json
from sd3pipe.errors import InputError
from sd3pipe.files import sync_file, sync_folder

_DTYPES = {"uint8": "|u1", "int32": "<i4", "uint32": "<u4", "int64": "<i8", "uint64": "<u8"}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}

Arrays = Mapping[str, np.ndarray]
ReadFile = Callable[[str], Any]  # a name below the group's folder -> its bytes; raises FileNotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metadata:
    """What a reader needs of an array's zarr.json."""

    data_type: Literal["uint8", "int32", "uint32", "int64", "uint64"]
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**53)]], Field(max_length=2)]


def arrays_hash(arrays: Arrays) -> str:
    """Returns blake3 over name, dtype, shape and bytes of each array, in name order."""
    hasher = blake3()
    for name in sorted(arrays):
        array = arrays[name]
        hasher.update(json.dumps([name, _NAMES[array.dtype], list(array.shape)], separators=(",", ":")).encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def write_group(folder: Path, arrays: Arrays) -> None:
    """Writes a new folder and makes it durable. Raises OSError."""
    files: dict[Path, Any] = {folder / "zarr.json": _json({"attributes": {}, "node_type": "group", "zarr_format": 3})}
    for name, array in arrays.items():
        files[folder / name / "zarr.json"] = _json(_metadata(array))
        if array.size:
            files[folder / name / _chunk(array.ndim)] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for name in arrays:
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor(16) as pool:  # waiting for the disk, which takes many small files as easily as one
        list(pool.map(_write, files, files.values()))
        list(pool.map(sync_folder, [folder, *(folder / name for name in arrays)]))


def read_array(read: ReadFile, name: str, where: str) -> np.ndarray:
    """Returns one array of a group, a view of the bytes that `read` gave. Raises InputError if it is damaged."""
    try:
        data = read(f"{name}/zarr.json")
        if len(data) > MOST_BYTES:
            raise ValueError("its zarr.json is too large")
        metadata = parse_json(bytes(data), _METADATA, "zarr.json")
        shape = metadata.shape
        data = read(f"{name}/{_chunk(len(shape))}") if math.prod(shape) else b""
        return np.frombuffer(data, dtype=_DTYPES[metadata.data_type]).reshape(shape)
    except (OSError, ValueError, DocumentError) as error:
        raise InputError(f"{where}: array {name} of the index cannot be read ({error})") from error


def _metadata(array: np.ndarray) -> dict[str, Any]:
    return {
        "attributes": {},
        "chunk_grid": {"configuration": {"chunk_shape": [max(1, size) for size in array.shape]}, "name": "regular"},
        "chunk_key_encoding": {"configuration": {"separator": "."}, "name": "default"},
        "codecs": [{"configuration": {"endian": "little"}, "name": "bytes"}],
        "data_type": _NAMES[array.dtype],
        "fill_value": 0,
        "node_type": "array",
        "shape": list(array.shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }


def _chunk(ndim: int) -> str:
    return ".".join(["c"] + ["0"] * ndim)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _write(path: Path, data: Any) -> None:
    with open(path, "xb") as handle:
        handle.write(data)
        sync_file(handle)


_METADATA = TypeAdapter(_Metadata)
