"""Rows as torch tensors. The only module of the cache that needs torch."""

# L tokens, D width, S scales of a token, G numbers that share one

import math
from collections.abc import Collection, Mapping
from typing import cast, get_args

import torch

from sd3pipe.cache.rows import SCALE, DType, Row, Tensor, packed_names
from sd3pipe.tensors.formats import FORMAT_NAMES, TORCH_FORMATS, bytes_of
from sd3pipe.words import SCALED_NEIGHBOURS

_LARGEST = 127


def row_to_torch(row: Row) -> dict[str, torch.Tensor]:
    """Returns a row's tensors on the CPU; packed ones as float32, without their scales."""
    tensors = {name: to_torch(tensor) for name, tensor in row.items()}
    scales = {name: tensors.pop(f"{name}{SCALE}") for name in packed_names(row)}
    return tensors | {name: _unpacked(tensors[name], scales_LS) for name, scales_LS in scales.items()}


def row_from_torch(tensors: Mapping[str, torch.Tensor], *, packed: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns the bytes of a row's tensors; those named by `packed` as int8 and, beside them, scales."""
    parts = {
        name: tensor
        for key, states_LD in tensors.items()
        for name, tensor in (_packed(key, states_LD) if key in packed else {key: states_LD}).items()
    }
    return {name: from_torch(tensor) for name, tensor in parts.items()}


def _packed(name: str, states_LD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns whole numbers and scales: the largest of each group of neighbours becomes 127."""
    group = math.gcd(states_LD.shape[-1], SCALED_NEIGHBOURS)
    states_LSG = states_LD.float().unflatten(-1, (-1, group))
    scales_LS = (states_LSG.abs().amax(-1) / _LARGEST).bfloat16()
    divisors_LS = scales_LS.float().masked_fill(scales_LS == 0, 1.0)
    values_LSG = (states_LSG / divisors_LS[..., None]).round().clamp(-_LARGEST, _LARGEST)
    return {name: values_LSG.flatten(-2).to(torch.int8), f"{name}{SCALE}": scales_LS}


def _unpacked(values_LD: torch.Tensor, scales_LS: torch.Tensor) -> torch.Tensor:
    values_LSG = values_LD.float().unflatten(-1, (scales_LS.shape[-1], -1))
    return (values_LSG * scales_LS.float()[..., None]).flatten(-2)


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Returns a CPU tensor; it shares the memory of rows that a CacheReader read, which nobody else holds."""
    dtype = TORCH_FORMATS[tensor.dtype]
    data = memoryview(tensor.data)
    if data.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype).reshape(tensor.shape)


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Returns the bytes of a float32, float16, bfloat16, uint8 or int8 tensor. Raises ValueError for other types."""
    name = FORMAT_NAMES.get(tensor.dtype)
    if name not in get_args(DType):
        raise ValueError(f"rows hold {', '.join(get_args(DType))}, not {tensor.dtype}")
    return Tensor(cast(DType, name), tuple(tensor.shape), bytes_of(tensor))
