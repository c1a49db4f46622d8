"""Writes safetensors files in a stream, in a given order: no more than one tensor is ever in memory."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import IO

from torch import Tensor

from sd3pipe.tensors.formats import FORMAT_NAMES, bytes_of
from sd3pipe.tensors.header import header_bytes, placed


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the library's own order: wide numbers first, so that all are aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def file_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a whole file from tensors in memory, in their order, with the metadata sorted."""
    entries = placed((name, FORMAT_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items())
    yield header_bytes(entries, dict(sorted(metadata.items())))
    yield from map(bytes_of, tensors.values())


def write_tensors(handle: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a whole file from tensors in memory, in their order."""
    handle.writelines(file_pieces(tensors, metadata))


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of all that follows the header: sd-scripts' sshs_model_hash."""
    hasher = hashlib.sha256()
    for tensor in tensors.values():
        hasher.update(bytes_of(tensor))
    return hasher.hexdigest()
