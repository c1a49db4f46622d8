"""Writes a whole model with an adapter in it: a single file or a diffusers folder, as the base is."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from sd3pipe.adapters.kind import Adapter
from sd3pipe.adapters.merged_file import (
    Merged,
    Target,
    check_complete,
    check_written,
    find_targets,
    merged_metadata,
    write_merged,
)
from sd3pipe.console import readable_bytes
from sd3pipe.errors import ParameterError, StorageError
from sd3pipe.files import atomic_file, atomic_folder, free_bytes
from sd3pipe.models.sources import ComponentSource
from sd3pipe.tensors.header import StoredTensor, read_header, read_header_and_metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModel:
    """What was written. `largest_rounding` is the share of a module's change that the base's number format lost."""

    path: Path
    changed: int
    nbytes: int
    largest_rounding: float
    largest_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One file of the base that holds tensors which change."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    targets: Mapping[str, Target]


def write_checkpoint(
    out: Path,
    adapter: Adapter,
    base: ComponentSource,
    folder: Path | None,
    *,
    multiplier: float,
    metadata: Mapping[str, str],
    device: torch.device,
) -> MergedModel:
    """Writes the model under a temporary name, reads it back, and only then names it.

    `folder` is the model that the base was found in, None where its file was named. Raises InputError where the adapter
    does not fit, ParameterError where the whole base is not on this disk, StorageError.
    """
    parts = _parts(base, adapter)
    options = _Options(adapter=adapter, multiplier=multiplier, metadata=metadata, device=device)
    if folder is not None and folder.is_dir() and all(part.path.is_relative_to(folder) for part in parts):
        return _write_folder(out, folder, parts, options)
    if len(parts) == 1 and (folder is None or folder.is_file()):
        return _write_file(out, parts[0], options)
    raise ParameterError(f"{base.where}: to merge into it, download the whole model and pass its folder as --model")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    adapter: Adapter
    multiplier: float
    metadata: Mapping[str, str]
    device: torch.device


def _parts(base: ComponentSource, adapter: Adapter) -> list[_Part]:
    parts: list[_Part] = []
    for path in base.paths:
        tensors, words = read_header_and_metadata(path)
        targets = find_targets(tensors.values(), adapter)
        parts.append(_Part(path=path, tensors=tensors, metadata=words, targets=targets))
    check_complete((target for part in parts for target in part.targets.values()), adapter, base.where)
    return parts


def _write_file(out: Path, part: _Part, options: _Options) -> MergedModel:
    if out.is_dir():
        raise ParameterError(f"{out}: is a folder, and the base is one file: name a file")
    needed = sum(tensor.nbytes for tensor in part.tensors.values())
    _check_space(out, needed)
    with atomic_file(out) as handle:
        merged = _merge(handle, part, options)
        handle.flush()
        nbytes = handle.tell()
        check_written(read_header(Path(handle.name)), merged)
    return _result(out, [merged], nbytes)


def _write_folder(out: Path, folder: Path, parts: list[_Part], options: _Options) -> MergedModel:
    """Writes a folder beside its final place: changed files merged, all others copied."""
    if os.path.lexists(out):
        raise ParameterError(f"{out}: exists already, and the base is a folder: name a new one")
    files = [path for path in folder.rglob("*") if path.is_file()]
    _check_space(out, sum(path.stat().st_size for path in files))
    changed = {part.path: part for part in parts}
    with atomic_folder(out) as temporary:
        merged: list[Merged] = []
        for path in files:
            target = temporary / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path not in changed:
                shutil.copyfile(path, target)
                continue
            with open(target, "xb") as handle:
                merged.append(_merge(handle, changed[path], options))
            check_written(read_header(target), merged[-1])
        nbytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    return _result(out, merged, nbytes)


def _merge(handle: IO[bytes], part: _Part, options: _Options) -> Merged:
    return write_merged(
        handle,
        part.tensors,
        part.targets,
        options.adapter,
        multiplier=options.multiplier,
        metadata=merged_metadata(part.metadata, options.metadata),
        device=options.device,
    )


def _check_space(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        sizes = f"{readable_bytes(needed)} are needed and {readable_bytes(free)} are free"
        raise StorageError(f"{out}: {sizes}: free space, or choose another place")


def _result(out: Path, merged: list[Merged], nbytes: int) -> MergedModel:
    worst = max(merged, key=lambda part: part.largest_rounding)
    return MergedModel(
        path=out,
        changed=sum(part.changed for part in merged),
        nbytes=nbytes,
        largest_rounding=worst.largest_rounding,
        largest_at=worst.largest_at,
    )
