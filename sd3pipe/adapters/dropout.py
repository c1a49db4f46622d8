"""Dropout masks that are a pure function of (key of the sample, layer, element): no generator, no state, any device.

A key stands for (seed, step, sample). So a mask depends neither on the batch that a sample falls into, nor on whether
the forward pass runs a second time for gradient checkpointing, and a resumed run draws what the first one drew.
"""

# B batch, N all other axes of a mask, which are free

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014): the constants of splitmix64
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FLOAT_BITS = 24  # an fp32 uniform number carries no more


@dataclass(slots=True)
class BatchState:
    """What layers know of the samples in the batch at hand; all layers of a network share one such object.

    `keys` are those of dropout, int64 [B]; `timesteps` are 1000 sigma [B], as the model is given them.
    """

    keys: Tensor | None = None
    timesteps: Tensor | None = None


def uniform(keys_B: Tensor, stream: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns fp32 numbers in [0, 1) of `shape` [B, ...]; row b depends on keys_B[b], `stream` and the place in it.

    `stream`, an int64 scalar, separates the layers and the kinds of dropout that share a sample's key. It is a tensor,
    and to the compiler the arithmetic is one opaque operator, so that compiled layers share their graphs and get the
    bits of others. Where nothing is compiled the operator would only import the compiler.
    """
    assert shape[0] == keys_B.shape[0], f"{keys_B.shape[0]} dropout keys for a batch of {shape[0]}"
    return (_opaque if torch.compiler.is_compiling() else _uniform)(keys_B, stream, shape)


def as_int64(number: int) -> int:
    """Returns the int64 with the same low 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


def _uniform(keys_B: Tensor, stream: Tensor, shape: Sequence[int]) -> Tensor:
    per_sample = math.prod(shape[1:])
    states_B = _mix(keys_B.to(torch.int64) + stream * as_int64(_GOLDEN))
    counters_N = torch.arange(1, per_sample + 1, dtype=torch.int64, device=keys_B.device) * as_int64(_GOLDEN)
    bits_BN = _mix(states_B[:, None] + counters_N[None, :])
    numbers_BN = _shift(bits_BN, 64 - _FLOAT_BITS).to(torch.float32) * 2.0**-_FLOAT_BITS
    return numbers_BN.view(*shape)


_opaque = torch.library.custom_op("sd3pipe::uniform", _uniform, mutates_args=())


@_opaque.register_fake
def _(keys_B: Tensor, stream: Tensor, shape: Sequence[int]) -> Tensor:
    return keys_B.new_empty(shape, dtype=torch.float32)


def kept(keys_B: Tensor, stream: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """Returns a boolean mask of `shape` [B, ...] that is False with probability `rate`."""
    return uniform(keys_B, stream, shape) >= rate


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * as_int64(_MIX_1)
    bits = (bits ^ _shift(bits, 27)) * as_int64(_MIX_2)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Returns the logical right shift; torch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
