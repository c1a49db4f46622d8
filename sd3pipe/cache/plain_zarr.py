"""A cache as plain zarr arrays, for whoever wants to read it with other tools."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe import stopping
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import layout_to_json
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_folder

_CHUNK_BYTES = 16 << 20


def export_zarr(cache: Path, out: Path) -> int:
    """Writes a new zarr group and returns the number of rows.

    Group `rows/N` has the N-th layout: its keys and one array for each tensor, a row each along the first axis;
    bfloat16 is widened to float32. Group `samples` has the samples table, with `layout` and `position` of each row.
    Raises InputError for a damaged cache or an `out` that exists, StorageError.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} exists: remove it or choose another --out")
    reader = CacheReader(cache, verify_reads="always")
    with atomic_folder(out) as temporary:
        _write(reader, temporary)
    return len(reader)


def _write(reader: CacheReader, folder: Path) -> None:
    import zarr  # takes half a second to import, and only this needs it

    root = zarr.create_group(folder, attributes=described(reader))
    layouts = reader.index.arrays["row_layout"]
    positions = np.zeros(len(reader), np.uint32)
    for number, layout in enumerate(reader.index.layouts):
        rows = np.flatnonzero(layouts == number)
        positions[rows] = np.arange(len(rows), dtype=np.uint32)
        group = root.create_group(f"rows/{number}", attributes={"tensors": layout_to_json(layout)})
        _create(group, "key", reader.keys[rows])
        arrays = {
            name: group.create_array(
                name,
                shape=(len(rows), *shape),
                chunks=(max(1, _CHUNK_BYTES // max(1, 4 * math.prod(shape))), *(max(1, size) for size in shape)),
                dtype={"F32": "float32", "F16": "float16", "BF16": "float32", "U8": "uint8", "I8": "int8"}[dtype],
                compressors=None,
            )
            for name, dtype, shape in layout
        }
        _fill(reader, rows, arrays)
    samples = root.create_group("samples")
    for name, values in reader.samples.to_columns(reader.keys).items():
        if values and isinstance(values[0], str):
            array = samples.create_array(name, shape=(len(values),), dtype=str, compressors=None)
            array[:] = np.array([as_utf8(value) for value in values], dtype=object)
        else:
            _create(samples, name, np.array(values, np.int32))
    numbers = reader.samples.numbers("row")
    _create(samples, "layout", layouts[numbers])
    _create(samples, "position", positions[numbers])


def _fill(reader: CacheReader, rows: np.ndarray, arrays: dict[str, Any]) -> None:
    """Writes rows a chunk of the largest array at a time."""
    step = min((array.chunks[0] for array in arrays.values()), default=1)
    for start in range(0, len(rows), step):
        stopping.check()
        batch = [reader.row(int(number)) for number in rows[start : start + step]]
        for name, array in arrays.items():
            array[start : start + len(batch)] = np.stack([row[name].numpy() for row in batch])


def _create(group: Any, name: str, values: np.ndarray) -> None:
    group.create_array(name, data=values, compressors=None)


def as_utf8(name: str) -> str:
    """Returns a name as UTF-8 has it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def described(reader: CacheReader) -> dict[str, Any]:
    """Returns what the rows of a cache are, and what they were made from."""
    manifest = reader.manifest
    return {
        "kind": manifest.kind,
        "recipe": dict(manifest.recipe),
        "recipe_version": manifest.recipe_version,
        "fingerprints": dict(manifest.fingerprints),
        "subsets": {name: dict(settings) for name, settings in manifest.subsets.items()},
        "extra": dict(manifest.extra),
    }
