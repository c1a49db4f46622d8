"""Frozen weights in fewer bits: packed tensors and scales as plain parameters, unpacked for each product.

Packed tensors travel in the same flat buffers as all others. Adapters and biases keep their own dtype; gradients pass
through the unpacked weight. Embedders, modulation and the final layer stay as loaded unless asked for: they are small
or act on every token at once.
"""

# O out features, I in features, N blocks of 64 weights

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sd3pipe.errors import ParameterError
from sd3pipe.memory.flat import is_modulation
from sd3pipe.words import PackedFormat

_FP8_LARGEST = 448.0  # of float8_e4m3fn
_INT8_LARGEST = 127.0
_NF4_BLOCK = 64  # weights that share one scale; QLoRA's choice (arXiv:2305.14314)


class PackableLinear(Protocol):
    """What packing asks of a linear layer."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter
    packing: "Packing | None"

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor: ...


class Packing(ABC):
    """How a weight is stored, and how products are taken with it: by default it is unpacked for each of them."""

    @abstractmethod
    def pack(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the packed weight and its scales."""

    @abstractmethod
    def dense(self, linear: PackableLinear, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`."""

    def output(self, x: Tensor, linear: PackableLinear) -> Tensor:
        return nn.functional.linear(x, self.dense(linear, x.dtype), linear.bias.to(x.dtype))

    def input_gradient(self, gradient: Tensor, linear: PackableLinear) -> Tensor:
        return gradient @ self.dense(linear, gradient.dtype)


class _ScaledChannels(Packing):
    """Eight bits a weight, and one scale for each output channel."""

    def dense(self, linear: PackableLinear, dtype: torch.dtype) -> Tensor:
        return linear.weight.detach().to(dtype) * linear.weight_scale.to(dtype)[:, None]


class Fp8Packing(_ScaledChannels):
    """float8_e4m3fn with one power of two per output channel, so that unpacking to 16 bits rounds nothing."""

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        largest_O = weight_OI.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scale_O = torch.exp2(torch.ceil(torch.log2(largest_O / _FP8_LARGEST)))
        return (weight_OI.float() / scale_O[:, None]).to(torch.float8_e4m3fn), scale_O


class Int8Packing(_ScaledChannels):
    """Whole numbers from -127 to 127 with one scale per output channel, which bfloat16 holds exactly."""

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        largest_O = weight_OI.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        exact_O = largest_O / _INT8_LARGEST
        scale_O = exact_O.bfloat16().float()
        next_O = (scale_O.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
        scale_O = torch.where(scale_O < exact_O, next_O, scale_O)
        return (weight_OI.float() / scale_O[:, None]).round().to(torch.int8), scale_O


class Nf4Packing(Packing):
    """Four-bit NormalFloat in blocks of 64 by bitsandbytes.functional, two weights a byte."""

    def __init__(self) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells about optional CPU kernels otherwise
        try:
            self._functional = importlib.import_module("bitsandbytes.functional")
        except (ImportError, RuntimeError, OSError) as error:
            raise ParameterError(
                f"an nf4 base needs bitsandbytes, which does not load here ({error}): use fp8"
            ) from error

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        packed, state = self._functional.quantize_4bit(weight_OI.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
        return packed, state.absmax

    def dense(self, linear: PackableLinear, dtype: torch.dtype) -> Tensor:
        scale_N = linear.weight_scale.detach()
        state = self._functional.QuantState(
            absmax=scale_N,
            shape=torch.Size((linear.out_features, linear.in_features)),  # no code: the kernels know NormalFloat
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        return self._functional.dequantize_4bit(linear.weight.detach(), state)


PACKINGS: dict[PackedFormat, type[Packing]] = {"fp8": Fp8Packing, "int8": Int8Packing, "nf4": Nf4Packing}


def quantise(module: nn.Module, format: PackedFormat, *, modulation: bool = False) -> None:
    """Packs the attention and MLP weights below `module`, and its adaLN weights if `modulation`.

    For a whole MMDiT or one joint block; a block at a time keeps the peak of host memory at one dense block. Raises
    ParameterError where the format's library is missing.
    """
    quantise_as(module, PACKINGS[format](), modulation=modulation)


@torch.no_grad()
def quantise_as(module: nn.Module, packing: Packing, *, modulation: bool = False) -> None:
    """Packs the attention and MLP weights below `module` in a given way."""
    for linear in packable_linears(module, modulation=modulation):
        packed, scale = packing.pack(linear.weight.data)
        linear.weight = nn.Parameter(packed, requires_grad=False)
        linear.weight_scale = nn.Parameter(scale.float(), requires_grad=False)
        linear.packing = packing


def packable_linears(module: nn.Module, *, modulation: bool = False) -> Iterator[PackableLinear]:
    """Yields the linear layers (layers with a `packing`) of joint blocks below `module` that packing is meant for."""
    for name, layer in module.named_modules():
        inside = ".attn" in f".{name}" or ".mlp." in f".{name}" or (modulation and is_modulation(name))
        embedder = name.split(".")[0] in ("t_embedder", "y_embedder", "final_layer")
        if inside and not embedder and hasattr(layer, "packing") and layer.packing is None:
            yield cast(PackableLinear, layer)


def bits_per_weight(format: PackedFormat, in_features: int) -> float:
    """Returns the stored bits of one weight, its share of the scales included."""
    if format == "nf4":
        return 4 + 32 / _NF4_BLOCK
    return 8 + 32 / in_features
