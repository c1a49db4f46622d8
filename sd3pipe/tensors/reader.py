"""Reads tensors straight into their final place and number format, each byte once.

A tensor that keeps its format on the CPU is read into its own memory without any copy; all others go through one
small buffer, so the peak is what is kept plus that buffer.
"""

import math
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.errors import InputError
from sd3pipe.tensors.entry import ByteRange, RangeReader, TensorEntry
from sd3pipe.tensors.formats import TORCH_FORMATS, bytes_of
from sd3pipe.tensors.header import StoredTensor, read_header

_STAGING_BYTES = 4 << 20
_THREADS = 4  # page faults and copies of one thread are slower than a good disk


def read_tensors(
    stored: Mapping[str, TensorEntry],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    keys: Collection[str] | None = None,
    may_stop: bool = True,
) -> dict[str, Tensor]:
    """Returns the tensors of a component, or those of `keys`, by key, in `dtype` on `device`.

    With dtype None each keeps its stored format; scaled fp8 weights become float32 then. fp8 is cast, and multiplied by
    its scale if it has one, in float32. Raises InputError for a file that ends too early, KeyError for an unknown key.
    """
    wanted = list(stored) if keys is None else list(keys)
    entries = {key: stored[key] for key in wanted}
    starts = {key: entry.ranges[0] for key, entry in entries.items()}
    in_file_order = sorted(entries, key=lambda key: (str(starts[key].path), starts[key].offset))
    with TensorReader(may_stop=may_stop) as reader, ThreadPoolExecutor(_THREADS) as pool:

        def read(key: str) -> Tensor:
            entry = entries[key]
            kept = TORCH_FORMATS[entry.dtype] if entry.scale is None else torch.float32
            tensor = torch.empty(entry.shape, dtype=dtype or kept, device=device)
            reader.read_into(entry, tensor)
            return tensor

        tensors = dict(zip(in_file_order, pool.map(read, in_file_order), strict=True))
    return {key: tensors[key] for key in wanted}


def read_stored(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Returns the tensors of a small file as they are stored, whole: a wish to stop does not cut the reading."""
    return read_tensors({name: tensor.entry for name, tensor in stored.items()}, dtype=None, may_stop=False)


def read_file(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a small file, as read_stored does. Raises InputError."""
    return read_stored(read_header(path))


class TensorReader(RangeReader):
    """Reads tensors into given memory: pinned host buffers, parts of flat buffers, device tensors.

    Safe to use from several threads, each of which has a buffer of its own for what must be converted.
    """

    def __init__(self, *, may_stop: bool = True) -> None:
        super().__init__(may_stop=may_stop)
        self._local = threading.local()

    def read_into(self, entry: TensorEntry, destination: Tensor) -> None:
        """Fills `destination`, a contiguous tensor of the entry's shape, in its own number format and on its device."""
        if tuple(destination.shape) != entry.shape or not destination.is_contiguous():
            raise ValueError(f"destination {list(destination.shape)} is not a contiguous {list(entry.shape)}")
        stored = TORCH_FORMATS[entry.dtype]
        if destination.dtype == stored and destination.device.type == "cpu" and entry.scale is None:
            view, done = bytes_of(destination), 0
            for part in entry.ranges:
                self.read_bytes(view[done : done + part.nbytes], part)
                done += part.nbytes
        else:
            self._read_converted(entry, stored, destination)

    def _read_converted(self, entry: TensorEntry, stored: torch.dtype, destination: Tensor) -> None:
        flat, scale, done = destination.view(-1), self._scale(entry), 0
        row_length = math.prod(entry.shape[1:])
        for part in entry.ranges:
            for start in range(0, part.nbytes, _STAGING_BYTES):
                values = self._staged(part, start, stored)
                if scale is not None:
                    rows = torch.arange(done, done + values.numel()) // row_length
                    values = values.float() * (scale if scale.numel() == 1 else scale[rows])
                flat[done : done + values.numel()].copy_(values)
                done += values.numel()

    def _staged(self, part: ByteRange, start: int, stored: torch.dtype) -> Tensor:
        """Returns the next piece of a range as it is stored; valid until the next call."""
        count = min(_STAGING_BYTES, part.nbytes - start)
        staging: Tensor | None = getattr(self._local, "staging", None)
        if staging is None or staging.numel() < count:
            staging = self._local.staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
        piece = staging[:count]
        self.read_bytes(bytes_of(piece), ByteRange(part.path, part.offset + start, count))
        return piece.view(stored)

    def _scale(self, entry: TensorEntry) -> Tensor | None:
        if entry.scale is None:
            return None
        scale = torch.empty(entry.scale.shape, dtype=torch.float32)
        self.read_into(entry.scale, scale)
        if not bool(torch.isfinite(scale).all()):
            raise InputError(f"{entry.scale.paths[0]}: an fp8 scale is not a finite number: the file is damaged")
        return scale.view(-1)
