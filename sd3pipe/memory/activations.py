"""Inputs of recomputed blocks wait on the host for the backward pass, carried there while the next block computes."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sd3pipe.memory.host import HostMemory
from sd3pipe.memory.lanes import Lane, lane_to

_STREAM_AXES = 3  # [B, L, D]; vectors per picture [B, K] are not worth a trip


class Parcel:
    """One tensor that is on the host, or on its way there or back."""

    def __init__(self, buffer: Tensor, like: Tensor, stored: object) -> None:
        self.buffer = buffer
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.stored = stored  # mark of the copy to the host
        self.returning: tuple[Tensor, object] | None = None
        self.marks: list[object] = []  # of copies back, which the buffer's next use waits for


class ActivationStore:
    """Keeps what autograd saves inside `saving()` on the host, in page-locked buffers that are used again.

    Copies leave on a lane of their own (the direction that one-way streaming leaves idle) and come back on another,
    one ahead of the backward pass. Only streams of tokens travel; vectors and weights stay where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out: Lane = lane_to(device)
        self._back: Lane = lane_to(device)
        self._host = HostMemory(device)
        self._free: dict[int, list[tuple[Tensor, list[object]]]] = defaultdict(list)
        self._waiting: list[weakref.ref[Parcel]] = []
        self.bytes_out = 0
        self.host_bytes = 0

    def close(self) -> None:
        """Unlocks the pages of all buffers."""
        self._host.close()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Sends what autograd saves in this block to the host."""
        with torch.autograd.graph.saved_tensors_hooks(self.put_away, self._unpack):
            yield

    def put_away(self, tensor: Tensor) -> Tensor | Parcel:
        """Sends a tensor to the host if it is a stream of tokens."""
        if tensor.ndim < _STREAM_AXES or isinstance(tensor, nn.Parameter) or tensor.device != self._device:
            return tensor
        return self.store(tensor)

    def store(self, tensor: Tensor) -> Parcel:
        """Starts a tensor's way to the host; its device memory is free once the copy is done."""
        nbytes = tensor.numel() * tensor.element_size()
        buffer, marks = self._free[nbytes].pop() if self._free[nbytes] else self._new_buffer(nbytes)
        source = tensor.detach().contiguous()
        target = buffer.view(tensor.dtype).view(tensor.shape)
        parcel = Parcel(buffer, tensor, self._out.copy(target, source, self._out.mark(), *marks))
        weakref.finalize(parcel, self._free[nbytes].append, (buffer, parcel.marks))
        self._waiting.append(weakref.ref(parcel))
        self.bytes_out += nbytes
        return parcel

    def load(self, parcel: Parcel) -> Tensor:
        """Returns the tensor on the device, and starts the way back of those stored just before it."""
        self._start_back(parcel)
        assert parcel.returning is not None
        tensor, mark = parcel.returning
        parcel.returning = None
        self._back.wait(mark)
        self._prefetch(parcel)
        return tensor

    def _new_buffer(self, nbytes: int) -> tuple[Tensor, list[object]]:
        self.host_bytes += nbytes
        return self._host.buffer(nbytes), []

    def _start_back(self, parcel: Parcel) -> None:
        if parcel.returning is None:
            tensor = torch.empty(parcel.shape, dtype=parcel.dtype, device=parcel.device)
            source = parcel.buffer.view(parcel.dtype).view(parcel.shape)
            mark = self._back.copy(tensor, source, parcel.stored, self._back.mark())
            parcel.marks.append(mark)
            parcel.returning = (tensor, mark)

    def _prefetch(self, parcel: Parcel) -> None:
        """Starts the way back of the two tensors (context and x) that the next block to be recomputed will ask for."""
        self._waiting = [ref for ref in self._waiting if ref() is not None and ref() is not parcel]
        for reference in self._waiting[-2:]:
            waiting = reference()
            if waiting is not None:
                self._start_back(waiting)

    def _unpack(self, saved: Tensor | Parcel) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.load(saved)
