"""Rows as torch tensors. The only module of the cache that needs torch."""

from typing import cast, get_args

import torch

from sd3pipe.cache.rows import DType, Tensor
from sd3pipe.tensors.formats import FORMAT_NAMES, TORCH_FORMATS, bytes_of


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Returns a CPU tensor; it shares the memory of rows that a CacheReader read, which nobody else holds."""
    dtype = TORCH_FORMATS[tensor.dtype]
    data = memoryview(tensor.data)
    if data.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype).reshape(tensor.shape)


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Returns the bytes of a float32, float16, bfloat16 or uint8 tensor. Raises ValueError for other types."""
    name = FORMAT_NAMES.get(tensor.dtype)
    if name not in get_args(DType):
        raise ValueError(f"rows hold {', '.join(get_args(DType))}, not {tensor.dtype}")
    return Tensor(cast(DType, name), tuple(tensor.shape), bytes_of(tensor))
