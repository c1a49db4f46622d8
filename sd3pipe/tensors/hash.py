"""A component's fingerprint: one hash over its tensors under canonical names, whatever files they lie in.

Only name, dtype, shape and bytes enter, so the VAE inside a checkpoint, in its own file and in a diffusers folder has
one fingerprint. Free of torch; memory is bounded by one chunk a thread.
"""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from sd3pipe.console import readable_bytes
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_json, is_hash
from sd3pipe.tensors.entry import RangeReader, TensorEntry, chunks

log = logging.getLogger(__name__)

_FORMAT = 1  # enters every fingerprint: raise it when the rule below changes
_CHUNK_BYTES = 4 << 20
_TOLD_BYTES = 1_000_000_000  # a longer read is announced
_MAX_THREADS = 4  # blake3 hashes some 2 GB/s a thread, so more only wait for the disk


def hash_tensors(tensors: Mapping[str, TensorEntry], stamps: FileStamps | None = None) -> str:
    """Returns the fingerprint of a component as 64 hex digits.

    With a stamps, a fingerprint of the same byte ranges of unchanged files is recalled instead of read; the caller
    saves the stamps. Raises InputError if a file cannot be read to its end.
    """
    parts = [part for entry in tensors.values() for part in (entry, entry.scale) if part is not None]
    paths = sorted({path for part in parts for path in part.paths})
    what = f"tensors {_plan_hash(tensors, paths)}"
    if stamps is not None:
        recalled = [stamps.recall(path, what) for path in paths]  # every file is asked: each look is also a stamp
        if is_hash(recalled[0]) and all(found == recalled[0] for found in recalled):
            return recalled[0]
    _tell_about_reading(tensors, paths)
    fingerprint = _hash(tensors)
    if stamps is not None:
        for path in paths:
            stamps.remember(path, what, fingerprint)
    return fingerprint


def _hash(tensors: Mapping[str, TensorEntry]) -> str:
    in_file_order = sorted(tensors, key=lambda key: (str(tensors[key].ranges[0].path), tensors[key].ranges[0].offset))
    with RangeReader() as reader, ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda key: _entry_digest(tensors[key], reader), in_file_order)
        digests = dict(zip(in_file_order, found, strict=True))
    return hash_json({"format": _FORMAT, "tensors": {key: digests[key] for key in sorted(digests)}})


def _tell_about_reading(tensors: Mapping[str, TensorEntry], paths: list[Path]) -> None:
    """Logs a line before a read that the user would wait for without knowing why."""
    nbytes = sum(entry.nbytes for entry in tensors.values())
    if nbytes >= _TOLD_BYTES:
        files = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
        log.info("reading %s of %s for their fingerprint", readable_bytes(nbytes), files)


def _entry_digest(entry: TensorEntry, reader: RangeReader) -> list[Any]:
    """Returns what stands for one tensor in the hash: dtype, shape, digest of its bytes, and the same of its scale."""
    hasher, buffer = blake3(), bytearray(min(_CHUNK_BYTES, entry.nbytes))
    for chunk in chunks(entry.ranges, _CHUNK_BYTES):
        view = memoryview(buffer)[: chunk.nbytes]
        reader.read_bytes(view, chunk)
        hasher.update(view)
    scale = [] if entry.scale is None else [_entry_digest(entry.scale, reader)]
    return [entry.dtype, list(entry.shape), hasher.hexdigest(), *scale]


def _plan_hash(tensors: Mapping[str, TensorEntry], paths: list[Path]) -> str:
    """Returns a hash of what would be read: which bytes of which of the files stand for which tensor."""
    numbers = {path: number for number, path in enumerate(paths)}

    def plan(entry: TensorEntry) -> list[Any]:
        ranges = [[numbers[part.path], part.offset, part.nbytes] for part in entry.ranges]
        return [entry.dtype, list(entry.shape), ranges, plan(entry.scale) if entry.scale else None]

    return hash_json({"format": _FORMAT, "tensors": {key: plan(entry) for key, entry in tensors.items()}})[:32]
