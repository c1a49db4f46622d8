"""Rows as torch tensors. The only module of the cache that needs torch."""

import torch

from sd3pipe.cache.rows import DType, Tensor

_TORCH_DTYPES: dict[DType, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Returns a CPU tensor; it shares the memory of rows that a CacheReader read, which nobody else holds."""
    dtype = _TORCH_DTYPES[tensor.dtype]
    data = memoryview(tensor.data)
    if data.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype).reshape(tensor.shape)


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Returns the bytes of a float32, float16, bfloat16 or uint8 tensor. Raises ValueError for other types."""
    if tensor.dtype not in _NAMES:
        raise ValueError(f"rows hold {', '.join(map(str, _NAMES))}, not {tensor.dtype}")
    dense = tensor.detach().to("cpu").contiguous()
    return Tensor(_NAMES[tensor.dtype], tuple(tensor.shape), dense.flatten().view(torch.uint8).numpy().data)
