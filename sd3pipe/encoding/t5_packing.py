"""T5 in fewer bits: the matrices of its blocks packed, unpacked for each product. What a base may be packed as, too."""

# O out features, I in features

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.memory.quantise import PACKINGS, Fp8Packing, Int8Packing, Nf4Packing
from sd3pipe.words import PackedFormat

Packing = Fp8Packing | Int8Packing | Nf4Packing


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
