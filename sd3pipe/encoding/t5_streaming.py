"""Whether T5 is held whole or read block by block: a question of the memory that is there."""

import math
from typing import Literal

import torch

from sd3pipe.device_memory import available_memory
from sd3pipe.models.sources import ComponentSource

_ROOM = 1.15  # of the weights' bytes
_ACTIVATION_BYTES = 2 << 30  # what a batch of T5-XXL takes beside the weights


def streams_t5(
    wish: Literal["auto", "on", "off"], source: ComponentSource, dtype: torch.dtype, device: torch.device
) -> bool:
    """Returns whether T5 is to be read block by block: with "auto", where it would not fit with room to spare."""
    if wish != "auto":
        return wish == "on"
    weights = sum(math.prod(shape) for shape in source.shapes().values()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return free is not None and _ROOM * weights + _ACTIVATION_BYTES > free
