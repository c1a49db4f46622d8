"""What a row is: a few named tensors as raw bytes. numpy has no bfloat16, so bytes carry their type's name."""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from sd3pipe.errors import InputError
from sd3pipe.tensors.header import ITEM_BYTES, tensor_bytes

DType = Literal["F32", "F16", "BF16", "U8", "I8"]

_NUMPY_DTYPES: dict[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1", "I8": "|i1"}

Size = Annotated[int, Field(strict=True, ge=0, lt=2**40)]
Layout = tuple[tuple[str, DType, tuple[Size, ...]], ...]  # name, dtype, shape of each tensor, in the order of the bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense little-endian tensor in C order, as safetensors stores it."""

    dtype: DType
    shape: tuple[int, ...]
    data: Any  # whatever has the buffer protocol

    def numpy(self) -> np.ndarray:
        """Returns the values: all but bfloat16 without a copy, bfloat16 widened to float32 without loss."""
        values = np.frombuffer(self.data, dtype=_NUMPY_DTYPES[self.dtype])
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(self.shape)


Row = Mapping[str, Tensor]

# What the latents of a picture are: mean and log-variance, the mean alone, or one draw that somebody else made
LATENTS = ("moments", "mean", "sample")


SCALE = "_scale"  # ends the name of the tensor with another one's scales


def packed_names(names: Collection[str]) -> list[str]:
    """Returns which tensors of a row are whole numbers with scales beside them."""
    return [name for name in names if f"{name}{SCALE}" in names]


def from_numpy(array: np.ndarray) -> Tensor:
    """Returns a tensor that holds a float32, float16, uint8 or int8 array's bytes."""
    for dtype in get_args(DType):
        if dtype != "BF16" and array.dtype == np.dtype(_NUMPY_DTYPES[dtype]):
            return Tensor(dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    raise ValueError(f"rows hold float32, float16, uint8 and int8 arrays, not {array.dtype}")


def latents_name(names: Container[str]) -> str:
    """Returns the name of the tensor with a row's latents. Raises InputError for a row of something else."""
    found = next((name for name in LATENTS if name in names), None)
    if found is None:
        raise InputError(f"a row of latents has none of {', '.join(LATENTS)}: update sd3pipe, or encode again")
    return found


def layout_of(row: Row) -> Layout:
    """Returns the order of a row's tensors in a file: wide items first, so that each is aligned, then by name.

    Raises ValueError for a tensor whose bytes do not fit its type and shape.
    """
    for name, tensor in row.items():
        expected, present = tensor_bytes(tensor.dtype, tensor.shape), memoryview(tensor.data).nbytes
        if expected != present:
            raise ValueError(f"tensor {name} {tensor.dtype} {list(tensor.shape)} has {present} bytes, not {expected}")
    names = sorted(row, key=lambda name: (-ITEM_BYTES[row[name].dtype], name))
    return tuple((name, row[name].dtype, tuple(row[name].shape)) for name in names)


def layout_bytes(layout: Layout) -> int:
    return sum(tensor_bytes(dtype, shape) for _, dtype, shape in layout)


def row_from_bytes(layout: Layout, data: memoryview) -> dict[str, Tensor]:
    """Returns a row whose tensors are views into its bytes."""
    row, start = {}, 0
    for name, dtype, shape in layout:
        end = start + tensor_bytes(dtype, shape)
        row[name] = Tensor(dtype, shape, data[start:end])
        start = end
    return row


def layout_to_json(layout: Layout) -> list[list[Any]]:
    """Returns a layout as JSON has it: [name, dtype, shape] of each tensor."""
    return [[name, dtype, list(shape)] for name, dtype, shape in layout]
