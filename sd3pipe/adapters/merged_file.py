"""A checkpoint file with an adapter in it, in the base's own layout and number formats, written in a stream.

Tensors that no delta touches are copied in pieces; of the others one is in memory at a time. What was written is read
back and compared by digest.
"""

# O out features of a layer

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import IO

import torch
from blake3 import blake3
from torch import Tensor

from sd3pipe.adapters.fusing import Rows, rows_of_part, swapped_halves
from sd3pipe.adapters.keymap import find_place, halves_swapped
from sd3pipe.adapters.kind import Adapter
from sd3pipe.adapters.sizes import depth_of, same_size
from sd3pipe.errors import InputError, StorageError
from sd3pipe.fingerprint import hash_chunks
from sd3pipe.tensors.entry import RangeReader, chunks
from sd3pipe.tensors.formats import TORCH_FORMATS, bytes_of
from sd3pipe.tensors.header import StoredTensor, header_bytes, placed

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_PIECE = 8 << 20
_OF_THE_BASE = ("modelspec.hash_sha256", "sshs_model_hash", "modelspec.date")  # no longer true


@dataclass(frozen=True, slots=True)
class Target:
    """The module whose delta changes a tensor, its weight or its bias; `rows` takes the tensor's from all rows."""

    path: str
    rows: Rows | None = None
    bias: bool = False


@dataclass(slots=True)
class Merged:
    """What the base's number format left of the changes."""

    digests: dict[str, str] = field(default_factory=dict)
    changed: int = 0
    largest_rounding: float = 0.0  # |stored - (W + change)| / |change|, of the module where it is largest
    largest_at: str = ""


def find_targets(tensors: Iterable[StoredTensor], adapter: Adapter) -> dict[str, Target]:
    """Returns, by tensor name, which tensors the adapter changes. Raises InputError where a weight is quantised."""
    depth = depth_of({path: delta.shape for path, delta in adapter.items()})
    targets: dict[str, Target] = {}
    names = {tensor.name: tensor for tensor in tensors}
    for name, tensor in names.items():
        target = _target(name, adapter, depth)
        if target is None:
            continue
        if not _is_float(tensor.dtype) or _has_scale(name, names):
            raise InputError(f"{tensor.path}: {name} is quantised: merge into the bf16, fp16 or fp32 model")
        targets[name] = target
    return targets


def check_complete(targets: Iterable[Target], adapter: Adapter, where: str) -> None:
    """Raises InputError where a part of the adapter found no tensor that it changes."""
    missing = sorted(adapter.keys() - {target.path for target in targets})
    if missing:
        raise InputError(
            f"{where}: the adapter does not fit the model, which has no {missing[0]} ({len(missing)} missing)"
        )


def write_merged(
    handle: IO[bytes],
    tensors: Mapping[str, StoredTensor],
    targets: Mapping[str, Target],
    adapter: Adapter,
    *,
    multiplier: float,
    metadata: Mapping[str, str],
    device: torch.device | str = "cpu",
) -> Merged:
    """Writes one file of the base again, with the changes in it: same names, order, shapes and number formats."""
    merged = Merged()
    handle.write(_header(tensors, metadata))
    with RangeReader() as base:
        for tensor in _in_order(tensors):
            hasher = blake3()
            if tensor.name in targets:
                pieces = _changed(base, tensor, targets[tensor.name], adapter, multiplier, device, merged)
            else:
                pieces = _pieces(base, tensor)
            for piece in pieces:
                handle.write(piece)
                hasher.update(piece)
            merged.digests[tensor.name] = hasher.hexdigest()
    return merged


def check_written(tensors: Mapping[str, StoredTensor], merged: Merged) -> None:
    """Reads a written file's tensors back. Raises StorageError where one is not what was written."""
    assert tensors.keys() == merged.digests.keys()
    with RangeReader() as reader:
        for name, tensor in tensors.items():
            if hash_chunks(_pieces(reader, tensor)) != merged.digests[name]:
                raise StorageError(f"{tensor.path}: {name} reads back otherwise than it was written: check the disk")


def merged_metadata(base: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Returns the base's metadata without what no longer holds, with more keys."""
    return {key: value for key, value in base.items() if key not in _OF_THE_BASE} | dict(added)


def _target(name: str, adapter: Adapter, depth: int) -> Target | None:
    module, _, kind = name.rpartition(".")
    target = _module_target(module, adapter, depth) if kind in ("weight", "bias") else None
    if target is None or kind == "weight":
        return target
    return None if adapter[target.path].bias_change() is None else replace(target, bias=True)


def _module_target(module: str, adapter: Adapter, depth: int) -> Target | None:
    for prefix in _PREFIXES:
        if module.startswith(prefix) and module.removeprefix(prefix) in adapter:
            return Target(module.removeprefix(prefix))
    place = find_place(module)
    if place is None or place.form != "diffusers" or place.path not in adapter:
        return None
    if place.part is not None:
        return Target(place.path, rows_of_part(place.part))
    return Target(place.path, swapped_halves if halves_swapped(place.path, depth) else None)


def _is_float(dtype: str) -> bool:
    return dtype in TORCH_FORMATS and TORCH_FORMATS[dtype].is_floating_point


def _has_scale(name: str, names: Mapping[str, StoredTensor]) -> bool:
    module = name.removesuffix(".weight")
    return any(f"{module}.{scale}" in names for scale in ("scale_weight", "weight_scale", "comfy_quant"))


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the header with the base's own order of names and of bytes."""
    entries = placed((tensor.name, tensor.dtype, tensor.shape) for tensor in _in_order(tensors))
    return header_bytes({name: entries[name] for name in tensors}, metadata)


def _in_order(tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    return sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))


def _pieces(reader: RangeReader, tensor: StoredTensor) -> Iterator[memoryview]:
    for piece in chunks(tensor.entry.ranges, _PIECE):
        data = memoryview(bytearray(piece.nbytes))
        reader.read_bytes(data, piece)
        yield data


def _changed(
    base: RangeReader,
    tensor: StoredTensor,
    target: Target,
    adapter: Adapter,
    multiplier: float,
    device: torch.device | str,
    merged: Merged,
) -> Iterator[memoryview]:
    """Yields the bytes of a tensor with its change, and notes how much of the change its number format keeps."""
    dtype, delta = TORCH_FORMATS[tensor.dtype], adapter[target.path]
    rows = target.rows or (lambda whole: whole)
    size = tuple(rows(torch.empty(delta.shape[:1] if target.bias else delta.shape, device="meta")).shape)
    stored = tensor.shape if target.bias else (*tensor.shape[:1], math.prod(tensor.shape[1:]))  # convolutions, too
    if not same_size(size, stored):
        raise InputError(
            f"{tensor.path}: the adapter does not fit the model: {target.path} has size {list(size)} in it, "
            f"{tensor.name} {list(tensor.shape)}"
        )
    raw = bytearray().join(_pieces(base, tensor))
    before = torch.frombuffer(raw, dtype=dtype).view(stored).to(device).float()
    delta = delta.on(device)
    bias_O = delta.bias_change() if target.bias else None
    exact = delta.merged(before, multiplier, target.rows) if bias_O is None else before + multiplier * rows(bias_O)
    written = exact.to(dtype)
    _note(merged, target.path, exact - before, written.float() - exact)
    yield bytes_of(written)


def _note(merged: Merged, path: str, change: Tensor, lost: Tensor) -> None:
    merged.changed += 1
    norm, error = float(torch.linalg.vector_norm(change)), float(torch.linalg.vector_norm(lost))
    rounding = error / norm if norm else 0.0
    if rounding > merged.largest_rounding:
        merged.largest_rounding, merged.largest_at = rounding, path
