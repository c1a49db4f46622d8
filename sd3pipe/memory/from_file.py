"""Blocks that are read from the checkpoint's file in every step, for hosts that cannot hold the streamed ones."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd3pipe.memory.copy_streams import CopyStream
from sd3pipe.memory.flat import FlatTensor, bind, flat_layout, is_modulation
from sd3pipe.memory.host import HostMemory
from sd3pipe.memory.schedule import STAGING_BUFFERS, Copy

_THREADS = 4  # a disk serves several reads at once


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """How many of the streamed blocks stay in the file, and what reads one of their tensors into given memory.

    `read` takes a block's number, a parameter's name and the memory, in `dtype`; it is called from several threads.
    """

    blocks: int
    dtype: torch.dtype
    read: Callable[[int, str, Tensor], None]


class FileBlock:
    """A block whose weights are in a file: its parameters are bound to a copy on the device, or are NaN."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        nothing = torch.full((1,), torch.nan, dtype=dtype)
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in list(block.named_parameters()):
            owner = block.get_submodule(name.rpartition(".")[0])
            fresh = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], fresh)
            parameters[name] = fresh
        self.layout = flat_layout(list(parameters.items()))
        self._ordered = [parameters[tensor.name] for tensor in self.layout.tensors]
        self._nothing = [parameter.data for parameter in self._ordered]

    def bind(self, views: Iterable[Tensor]) -> None:
        """Lets the parameters read from `views`, which hold the block."""
        bind(self._ordered, views)

    def unbind(self) -> None:
        """Takes the weights away."""
        bind(self._ordered, self._nothing)


class Staging:
    """A few page-locked buffers into which the file is read ahead of the copies to the device.

    A buffer is filled again once the copy from it is over.
    """

    def __init__(
        self, blocks: Mapping[int, FileBlock], file: WeightsFile, memory: HostMemory, stream: CopyStream
    ) -> None:
        self.blocks = dict(blocks)
        self._file, self._stream = file, stream
        size = max(block.layout.total_bytes for block in blocks.values())
        buffers = [memory.buffer(size) for _ in range(STAGING_BUFFERS)]
        self._free: deque[tuple[Tensor, object]] = deque((buffer, None) for buffer in buffers)
        self._under_way: dict[Copy, tuple[Tensor, list[Future[None]]]] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def expect(self, coming: Iterable[Copy]) -> None:
        """Starts reading what is copied next, as far as there are buffers; one is left for what nobody expected."""
        wanted = list(itertools.islice(coming, STAGING_BUFFERS - 1))
        for copy in [copy for copy in self._under_way if copy not in wanted]:
            self._free.append((self._finished(copy), None))
        for copy in wanted:
            if copy not in self._under_way:
                self._start(copy)

    def take(self, copy: Copy) -> Tensor:
        """Returns the buffer that holds a part of a block, at the places that it has in the block's layout."""
        if copy not in self._under_way:
            self._start(copy)
        return self._finished(copy)

    def give_back(self, buffer: Tensor, copied: object) -> None:
        """Takes a buffer back whose copy to the device has this event."""
        self._free.append((buffer, copied))

    def _start(self, copy: Copy) -> None:
        buffer, copied = self._free.popleft()

        def fill(tensor: FlatTensor) -> None:
            self._stream.finish(copied)
            self._file.read(copy.block, tensor.name, tensor.view(buffer))

        tensors = self.blocks[copy.block].layout.tensors
        if copy.part != "whole":
            tensors = [tensor for tensor in tensors if is_modulation(tensor.name) == (copy.part == "modulation")]
        self._under_way[copy] = (buffer, [self._pool.submit(fill, tensor) for tensor in tensors])

    def _finished(self, copy: Copy) -> Tensor:
        buffer, futures = self._under_way.pop(copy)
        for future in futures:
            future.result()
        return buffer
