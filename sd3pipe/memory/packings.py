"""Which way of packing settings ask for."""

import torch

from sd3pipe.memory.eight_bit import EightBitProducts
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.quantise import PACKINGS, Packing


def block_packing(settings: Settings, device: torch.device) -> Packing | None:
    """Returns how the base's blocks are packed; None: not at all. Raises ParameterError for what cannot be had here."""
    if settings.matmul_dtype is not None:
        rotated = settings.matmul_dtype == "int8" if settings.matmul_rotation is None else settings.matmul_rotation
        return EightBitProducts(settings.matmul_dtype, rotated=rotated, device=device)
    return None if settings.base_format == "dense" else PACKINGS[settings.base_format]()
