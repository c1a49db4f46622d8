"""Inputs of recomputed blocks wait on the host for the backward pass, carried there while the next block computes."""

import contextlib
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sd3pipe.memory.copy_streams import CopyStream, copy_stream_to
from sd3pipe.memory.host import HostMemory

_STREAM_AXES = 3  # [B, L, D]; vectors per picture [B, K] are not worth a copy
_LEAVING = 4  # tensors on the device that are being copied to the host: context and x of two blocks
_SIZE_CLASSES = 8  # of buffers, from one power of two to the next: buckets of like size share buffers


class OffloadedTensor:
    """One tensor that is on the host, or on its way there or back."""

    def __init__(self, transfer: "_Transfer", like: Tensor) -> None:
        self.transfer = transfer
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.nbytes = like.numel() * like.element_size()

    def on_host(self) -> Tensor:
        """Returns the tensor inside its buffer."""
        return self.transfer.buffer[: self.nbytes].view(self.dtype).view(self.shape)


class _Transfer:
    """A buffer under way, with what is pending when its tensor is dropped."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.stored: object = None  # event of the copy to the host
        self.returning: tuple[Tensor, object] | None = None


class ActivationStore:
    """Keeps what autograd saves inside `saving()` on the host, in page-locked buffers that are used again.

    Copies leave on a stream of their own (the direction that one-way streaming leaves idle) and come back on another,
    one ahead of the backward pass. Only streams of tokens travel; vectors and weights stay where they are. Memory on
    the device is given away in the order of the computation, which waits for a copy two blocks after it was begun: so
    the peak does not depend on how far the host runs ahead.
    """

    def __init__(self, device: torch.device, *, out: CopyStream | None = None, back: CopyStream | None = None) -> None:
        self._device = device
        self._out, self._back = out or copy_stream_to(device), back or copy_stream_to(device)
        self._host = HostMemory(device)
        self._free: dict[int, list[_Transfer]] = defaultdict(list)
        self._leaving: deque[tuple[Tensor, object]] = deque()
        self._waiting: list[weakref.ref[OffloadedTensor]] = []
        self.bytes_out = 0
        self.host_bytes = 0

    def close(self) -> None:
        """Ends all copies to the host and unlocks the pages of all buffers."""
        self._let_go(0)
        self._host.close()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Sends what autograd saves in this block to the host."""
        with torch.autograd.graph.saved_tensors_hooks(self.put_away, self._unpack):
            yield

    def put_away(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Sends a tensor to the host if it is a stream of tokens."""
        if tensor.ndim < _STREAM_AXES or isinstance(tensor, nn.Parameter) or tensor.device != self._device:
            return tensor
        return self.store(tensor)

    def store(self, tensor: Tensor) -> OffloadedTensor:
        """Starts a tensor's way to the host; its device memory is free once the copy is done."""
        source = tensor.detach().contiguous()
        unit = max(1, (1 << (source.nbytes.bit_length() - 1)) // _SIZE_CLASSES)
        capacity = -(-source.nbytes // unit) * unit  # at most an eighth more
        fitting = [size for size, transfers in self._free.items() if transfers and capacity <= size <= 2 * capacity]
        if fitting:
            transfer = self._free[min(fitting)].pop()
        else:
            self.host_bytes += capacity
            transfer = _Transfer(self._host.buffer(capacity))
        offloaded = OffloadedTensor(transfer, tensor)
        transfer.stored = self._out.copy(offloaded.on_host(), source, self._out.record_event())
        weakref.finalize(offloaded, self._recycle, transfer)
        self._leaving.append((source, transfer.stored))
        self._let_go(_LEAVING)
        self._waiting.append(weakref.ref(offloaded))
        self.bytes_out += offloaded.nbytes
        return offloaded

    def load(self, offloaded: OffloadedTensor) -> Tensor:
        """Returns the tensor on the device."""
        self.start_back(offloaded)
        assert offloaded.transfer.returning is not None
        tensor, event = offloaded.transfer.returning
        offloaded.transfer.returning = None
        self._back.wait(event)
        return tensor

    def start_back(self, offloaded: OffloadedTensor) -> None:
        """Starts a tensor's way back, ahead of `load`."""
        transfer = offloaded.transfer
        if transfer.returning is None:
            tensor = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=offloaded.device)
            transfer.returning = (
                tensor,
                self._back.copy(tensor, offloaded.on_host(), transfer.stored, self._back.record_event()),
            )

    def _let_go(self, kept: int) -> None:
        """Drops all but the last tensors that leave, once the computation waits for their copies."""
        while len(self._leaving) > kept:
            _, event = self._leaving.popleft()
            self._out.wait(event)

    def _recycle(self, transfer: _Transfer) -> None:
        """Takes back the buffer of a tensor that nothing refers to any more."""
        if transfer.returning is not None:  # it came back for nothing; its memory is not free before the copy is over
            self._back.wait(transfer.returning[1])
            transfer.returning = None
        self._free[transfer.buffer.numel()].append(transfer)

    def _unpack(self, saved: Tensor | OffloadedTensor) -> Tensor:
        """Returns the tensor, and starts the way back of the two (context and x) that the next block will ask for."""
        if isinstance(saved, Tensor):
            return saved
        tensor = self.load(saved)
        self._waiting = [ref for ref in self._waiting if ref() is not None and ref() is not saved]
        for reference in self._waiting[-2:]:
            waiting = reference()
            if waiting is not None:
                self.start_back(waiting)
        return tensor
