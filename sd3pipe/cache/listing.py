"""What a cache is and what it weighs, for people and for programs."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe.cache.folder import MANIFEST, CacheFolder, entries_of
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.unused import unused_files
from sd3pipe.errors import InputError


def find_caches(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a cache, else the caches in it. Raises InputError if there are none."""
    if (folder / MANIFEST).exists():
        return [folder]
    found = [path for path in sorted(entries_of(folder)) if (path / MANIFEST).exists()]
    if not found:
        raise InputError(f"{folder} is no finished cache and holds none: encode first, or name another folder")
    return found


def describe(cache: Path) -> dict[str, Any]:
    """Returns recipe, fingerprints, counts and sizes of a cache as JSON types."""
    reader = CacheReader(cache, verify_reads="never")
    manifest, index = reader.manifest, reader.index
    unused = unused_files(cache)
    return {
        "cache": str(cache),
        "kind": manifest.kind,
        "rows": manifest.rows,
        "samples": manifest.samples,
        "segments": len(index.segments()),
        "bytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
        "row_bytes": int(index.arrays["row_bytes"].sum(dtype=np.uint64)),
        "recipe": dict(manifest.recipe),
        "recipe_version": manifest.recipe_version,
        "fingerprints": dict(manifest.fingerprints),
        "subsets": {
            name: {**settings, "samples": _samples(reader)[name]} for name, settings in manifest.subsets.items()
        },
        "layouts": _layouts(reader),
        "quarantined": [dict(entry) for entry in manifest.quarantined],
        "unused": {"files": len(unused), "bytes": sum(item.nbytes for item in unused)},
        "writers": len(entries_of(CacheFolder(cache).writers)),
    }


def _samples(reader: CacheReader) -> Mapping[str, int]:
    """Returns the number of samples of each subset."""
    return Counter(reader.samples.strings("subset").to_list()) if reader.manifest.kind != "prompts" else Counter()


def _layouts(reader: CacheReader) -> list[dict[str, Any]]:
    """Returns each shape that rows have, with how many have it, the most frequent first."""
    counts = np.bincount(reader.index.arrays["row_layout"], minlength=len(reader.index.layouts)).tolist()
    ordered = sorted(zip(reader.index.layouts, counts, strict=True), key=lambda item: -item[1])
    return [
        {"rows": rows, "tensors": {name: [dtype, *shape] for name, dtype, shape in layout}} for layout, rows in ordered
    ]
