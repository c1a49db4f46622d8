"""Number formats: what `auto` means on a device, and what the base model is loaded in."""

import torch

from sd3pipe.device import has_bfloat16
from sd3pipe.words import Precision, WantedPrecision

BASE_DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_precision(mixed_precision: WantedPrecision, device: torch.device) -> Precision:
    """Returns bf16 where CUDA computes in it, fp16 on older cards, float32 on the CPU; or what was asked for."""
    if mixed_precision != "auto":
        return mixed_precision
    if device.type != "cuda":
        return "no"
    return "bf16" if has_bfloat16() else "fp16"
