"""Writes a whole model with an adapter in it: a single file or a diffusers folder, as the base is.

Layout and number formats are the base's own. Tensors that no delta touches are copied in pieces; of the others one is
in memory at a time. What was written is read back and compared by digest.
"""

# O out features of a layer

import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from blake3 import blake3
from pydantic import TypeAdapter

from sd3pipe.adapters.fusing import Rows, rows_of_part, swapped_halves
from sd3pipe.adapters.keymap import find_native_module, halves_swapped
from sd3pipe.adapters.kind import Adapter
from sd3pipe.adapters.sizes import depth_of, same_size
from sd3pipe.console import readable_bytes
from sd3pipe.documents import read_json
from sd3pipe.errors import InputError, ParameterError, StorageError
from sd3pipe.exporting.adapter_files import refuse_other_ending
from sd3pipe.files import atomic_file, atomic_folder, free_bytes
from sd3pipe.fingerprint import hash_chunks
from sd3pipe.models.sources import ComponentSource
from sd3pipe.tensors.entry import RangeReader, chunks
from sd3pipe.tensors.formats import TORCH_FORMATS, bytes_of
from sd3pipe.tensors.header import StoredTensor, header_bytes, placed, read_header, read_header_and_metadata

log = logging.getLogger(__name__)

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_SCALES = ("scale_weight", "weight_scale", "comfy_quant")  # beside a quantised weight
_PIECE = 8 << 20
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".onnx", ".msgpack")
_OBJECT = TypeAdapter(dict[str, Any])
_OF_THE_BASE = ("modelspec.hash_sha256", "sshs_model_hash", "modelspec.date")  # no longer true


@dataclass(slots=True, kw_only=True)
class MergedModel:
    """What was written, and what the base's number format left of the changes."""

    path: Path
    changed: int = 0
    nbytes: int = 0
    largest_rounding: float = 0.0  # |stored - (W + change)| / |change|, of the module where it is largest
    largest_at: str = ""


@dataclass(frozen=True, slots=True)
class _Target:
    """The module whose delta changes a tensor, its weight or its bias; `rows` takes the tensor's from all rows."""

    path: str
    rows: Rows | None = None
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One file of the base, and by name which of its tensors change."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    targets: Mapping[str, _Target]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merging:
    """What goes into every part."""

    adapter: Adapter
    multiplier: float
    metadata: Mapping[str, str]
    device: torch.device
    result: MergedModel


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
    does not fit or a weight is quantised, ParameterError where the whole base is not on this disk, StorageError.
    """
    parts = _parts(base, adapter)
    result = MergedModel(path=out)
    merging = _Merging(adapter=adapter, multiplier=multiplier, metadata=metadata, device=device, result=result)
    if folder is not None and folder.is_dir() and all(part.path.is_relative_to(folder) for part in parts):
        _write_folder(out, folder, parts, merging)
    elif len(parts) == 1 and (folder is None or folder.is_file()):
        _write_file(out, parts[0], merging)
    else:
        raise ParameterError(f"{base.where}: to merge into it, download the whole model and pass its folder as --model")
    return result


def _parts(base: ComponentSource, adapter: Adapter) -> list[_Part]:
    depth = depth_of({path: delta.shape for path, delta in adapter.items()})
    parts: list[_Part] = []
    for path in base.paths:
        tensors, metadata = read_header_and_metadata(path)
        found = {name: target for name in tensors if (target := _target(name, adapter, depth)) is not None}
        for name in found:
            dtype = TORCH_FORMATS.get(tensors[name].dtype)
            scaled = any(f"{name.removesuffix('.weight')}.{scale}" in tensors for scale in _SCALES)
            if scaled or dtype is None or not dtype.is_floating_point:
                raise InputError(f"{path}: {name} is quantised: merge into the bf16, fp16 or fp32 model")
        parts.append(_Part(path=path, tensors=tensors, metadata=metadata, targets=found))
    missing = sorted(adapter.keys() - {target.path for part in parts for target in part.targets.values()})
    if missing:
        raise InputError(
            f"{base.where}: the adapter does not fit the model, which has no {missing[0]} ({len(missing)} missing)"
        )
    return parts


def _target(name: str, adapter: Adapter, depth: int) -> _Target | None:
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    natives = (module.removeprefix(prefix) for prefix in _PREFIXES if module.startswith(prefix))
    path, rows = next((native for native in natives if native in adapter), None), None
    if path is None:
        place = find_native_module(module)
        if place is None or place.form != "diffusers" or place.path not in adapter:
            return None
        path = place.path
        if place.part is not None:
            rows = rows_of_part(place.part)
        elif halves_swapped(path, depth):
            rows = swapped_halves
    if kind == "bias" and adapter[path].bias_change() is None:
        return None
    return _Target(path, rows, bias=kind == "bias")


def _write_file(out: Path, part: _Part, merging: _Merging) -> None:
    if out.is_dir():
        raise ParameterError(f"{out}: is a folder, and the base is one file: name a file")
    refuse_other_ending(out)
    _check_space(out, sum(tensor.nbytes for tensor in part.tensors.values()))
    with atomic_file(out) as handle:
        digests = _write_part(handle, part, merging)
        handle.flush()
        merging.result.nbytes = handle.tell()
        _check_written(Path(handle.name), digests)


def _write_folder(out: Path, folder: Path, parts: list[_Part], merging: _Merging) -> None:
    """Writes a folder beside its final place: changed files merged, what else the model is made of copied."""
    if os.path.lexists(out):
        raise ParameterError(f"{out}: exists already, and the base is a folder: name a new one")
    changed = {part.path: part for part in parts}
    files = list(_of_the_model(folder, changed))
    _check_space(out, sum(path.stat().st_size for path in files))
    with atomic_folder(out) as temporary:
        for path in files:
            target = temporary / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path not in changed:
                shutil.copyfile(path, target)
                continue
            with open(target, "xb") as handle:
                digests = _write_part(handle, changed[path], merging)
            _check_written(target, digests)
        merging.result.nbytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())


def _of_the_model(folder: Path, changed: Collection[Path]) -> Iterator[Path]:
    """Yields the files that a diffusers folder's model is made of; warns of other weights, without the adapter.

    A download from the hub often holds the model a second time, in one file, and hidden folders of programs.
    """
    index, merged = folder / "model_index.json", {path.parent for path in changed}
    components = read_json(index, _OBJECT) if index.exists() else None
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        is_of_a_component = len(parts) > 1 if components is None else parts[0] in components
        if path.suffix in _WEIGHTS and path not in changed and (path.parent in merged or not is_of_a_component):
            left_out.append("/".join(parts))
        else:
            yield path
    if left_out:
        log.warning("%s: left out, as the adapter is not merged into them: %s", folder, ", ".join(left_out))


def _check_space(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        sizes = f"{readable_bytes(needed)} are needed and {readable_bytes(free)} are free"
        raise StorageError(f"{out}: {sizes}: free space, or choose another place")


def _write_part(handle: IO[bytes], part: _Part, merging: _Merging) -> dict[str, str]:
    """Writes one file of the base with the changes in it, names, order and shapes as they were; returns digests."""
    in_order = sorted(part.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
    entries = placed((tensor.name, tensor.dtype, tensor.shape) for tensor in in_order)
    kept = {key: value for key, value in part.metadata.items() if key not in _OF_THE_BASE}
    handle.write(header_bytes({name: entries[name] for name in part.tensors}, {**kept, **merging.metadata}))
    digests: dict[str, str] = {}
    with RangeReader() as base:
        for tensor in in_order:
            target, hasher = part.targets.get(tensor.name), blake3()
            for piece in _pieces(base, tensor) if target is None else [_changed(base, tensor, target, merging)]:
                handle.write(piece)
                hasher.update(piece)
            digests[tensor.name] = hasher.hexdigest()
    return digests


def _check_written(path: Path, digests: Mapping[str, str]) -> None:
    """Reads a written file's tensors back. Raises StorageError where one is not what was written."""
    tensors = read_header(path)
    assert tensors.keys() == digests.keys()
    with RangeReader() as reader:
        for name, tensor in tensors.items():
            if hash_chunks(_pieces(reader, tensor)) != digests[name]:
                raise StorageError(f"{path}: {name} reads back otherwise than it was written: check the disk")


def _pieces(reader: RangeReader, tensor: StoredTensor) -> Iterator[memoryview]:
    for piece in chunks(tensor.entry.ranges, _PIECE):
        data = memoryview(bytearray(piece.nbytes))
        reader.read_bytes(data, piece)
        yield data


def _changed(base: RangeReader, tensor: StoredTensor, target: _Target, merging: _Merging) -> memoryview:
    """Returns the bytes of a tensor with its change, and notes how much of the change its number format keeps."""
    dtype, delta = TORCH_FORMATS[tensor.dtype], merging.adapter[target.path]
    rows = target.rows or (lambda whole: whole)
    size = tuple(rows(torch.empty(delta.shape[:1] if target.bias else delta.shape, device="meta")).shape)
    stored = tensor.shape if target.bias else (*tensor.shape[:1], math.prod(tensor.shape[1:]))  # convolutions, too
    if not same_size(size, stored):
        raise InputError(
            f"{tensor.path}: the adapter does not fit the model: {target.path} has size {list(size)} in it, "
            f"{tensor.name} {list(tensor.shape)}"
        )
    raw = bytearray().join(_pieces(base, tensor))
    before = torch.frombuffer(raw, dtype=dtype).view(stored).to(merging.device).float()
    delta = delta.on(merging.device)
    bias_O, strength = delta.bias_change() if target.bias else None, merging.multiplier
    exact = delta.merged(before, strength, target.rows) if bias_O is None else before + strength * rows(bias_O)
    written = exact.to(dtype)
    norm = float(torch.linalg.vector_norm(exact - before))
    rounding = float(torch.linalg.vector_norm(written.float() - exact)) / norm if norm else 0.0
    merging.result.changed += 1
    if rounding > merging.result.largest_rounding:
        merging.result.largest_rounding, merging.result.largest_at = rounding, target.path
    return bytes_of(written)
