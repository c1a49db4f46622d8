"""Number formats: safetensors' words for torch's, and the bytes of a tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sd3pipe.words import Format

TORCH_FORMATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
DTYPES: Mapping[Format, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FORMAT_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_FORMATS.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order: its own memory where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
