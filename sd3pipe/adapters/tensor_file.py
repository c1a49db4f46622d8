"""Writes safetensors files in a stream, in a given order: no more than one tensor is ever in memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file that is to be written."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    nbytes: int


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Returns the start of a file whose tensors follow one another in the order of `entries`."""
    # sorted, for the library hands metadata out in a random order, and equal content shall be equal bytes
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the tensors start on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the library's own order: wide numbers first, so that all are aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def file_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a whole file from tensors in memory, in their order."""
    yield header_bytes(
        (
            Entry(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), nbytes=tensor.nbytes)
            for name, tensor in tensors.items()
        ),
        metadata,
    )
    yield from map(tensor_bytes, tensors.values())


def write_tensors(handle: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a whole file from tensors in memory, in their order."""
    for piece in file_pieces(tensors, metadata):
        handle.write(piece)


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of all that follows the header: sd-scripts' sshs_model_hash."""
    hasher = hashlib.sha256()
    for tensor in tensors.values():
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
