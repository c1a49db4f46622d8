"""Whether T5 is held whole or read block by block: a question of the memory that is there."""

import math
from collections.abc import Sequence

import torch

from sd3pipe.device_memory import available_memory
from sd3pipe.memory.quantise import bits_per_weight
from sd3pipe.models.sources import ComponentSource
from sd3pipe.words import AutoOnOff, PackedFormat

_ROOM = 1.15  # of the weights' bytes
_ACTIVATION_BYTES = 2 << 30  # what a batch of T5-XXL takes beside the weights


def streams_t5(
    wish: AutoOnOff,
    source: ComponentSource,
    dtype: torch.dtype,
    device: torch.device,
    packed: PackedFormat | None = None,
) -> bool:
    """Returns whether T5 is to be read block by block: with "auto", where it would not fit with room to spare."""
    if wish != "auto":
        return wish == "on"
    weights = t5_bytes(source, dtype, packed)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return free is not None and _ROOM * weights + _ACTIVATION_BYTES > free


def t5_bytes(source: ComponentSource, dtype: torch.dtype, packed: PackedFormat | None) -> int:
    """Returns what all weights take while T5 is held whole."""
    return sum(_nbytes(key, shape, dtype, packed) for key, shape in source.shapes().items())


def _nbytes(key: str, shape: Sequence[int], dtype: torch.dtype, packed: PackedFormat | None) -> int:
    """Returns what a tensor takes; the matrices inside the blocks may be packed."""
    matrix = len(shape) == 2 and ".layer." in key and "relative_attention_bias" not in key
    if packed is None or not matrix:
        return math.prod(shape) * dtype.itemsize
    return int(math.prod(shape) * bits_per_weight(packed, shape[1]) / 8)
