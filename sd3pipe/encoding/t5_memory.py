"""How T5 fits the memory: read block by block, or its blocks' matrices packed, and unpacked for each product."""

# O out features, I in features

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.device_memory import available_memory
from sd3pipe.memory.quantise import PACKINGS, Packing, bits_per_weight
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
    total = 0
    for key, shape in source.shapes().items():
        matrix = len(shape) == 2 and ".layer." in key and "relative_attention_bias" not in key  # of a block
        if packed is None or not matrix:
            total += math.prod(shape) * dtype.itemsize
        else:
            total += int(math.prod(shape) * bits_per_weight(packed, shape[1]) / 8)
    return total


@dataclass(slots=True, kw_only=True)
class _PackedWeight:
    """A matrix [O, I] as its packing keeps it."""

    in_features: int
    out_features: int
    weight: Any
    weight_scale: Any


class PackedLinear(nn.Module):
    """y = x W^T with a packed weight."""

    weight = None  # transformers casts what it multiplies to the number format of a weight, where it finds one

    def __init__(self, weight_OI: Tensor, packing: Packing) -> None:
        super().__init__()
        packed, scale = packing.pack(weight_OI)
        rows, columns = weight_OI.shape
        self._packing = packing
        self._stored = _PackedWeight(in_features=columns, out_features=rows, weight=packed, weight_scale=scale.float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._packing.dense(self._stored, x.dtype))  # pyright: ignore[reportArgumentType]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and its scales."""
        return self._stored.weight.nbytes + self._stored.weight_scale.nbytes


def t5_packer(format: PackedFormat | None) -> Callable[[nn.Module], None] | None:
    """Returns what packs the linear layers of a T5 block in place, or None for no format.

    Norms, the embedding and the position bias stay as they are. Raises ParameterError where the format's library is
    missing.
    """
    if format is None:
        return None
    packing = PACKINGS[format]()

    @torch.no_grad()
    def pack(block: nn.Module) -> None:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent), attribute, PackedLinear(layer.weight, packing))

    return pack
