"""How bytes get between host and device: on a stream of their own with CUDA, at once without it.

A lane hands out marks. A mark stands for "everything asked for so far is done"; waiting for one never stops the host.
"""

from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """Copies in one direction, in order, beside the computation."""

    def copy(self, target: Tensor, source: Tensor, *after: object) -> object:
        """Copies once all of `after` have happened; returns the mark of the copy.

        Both tensors have to live until the computation has been made to wait for that mark: the lane keeps neither.
        """
        ...

    def wait(self, mark: object) -> None:
        """Makes the computation that follows wait for a copy's mark."""
        ...

    def mark(self) -> object:
        """Returns a mark of all computation so far, for a later copy to wait for."""
        ...


class DirectLane:
    """Copies at once. Nothing is ever pending, so marks mean nothing."""

    def copy(self, target: Tensor, source: Tensor, *after: object) -> object:
        target.copy_(source)
        return None

    def wait(self, mark: object) -> None:
        return None

    def mark(self) -> object:
        return None


class CudaLane:
    """Copies on a stream of its own, ordered against the computation by events alone.

    Tensors are not told of the stream (record_stream): torch would then keep the memory of a dropped one until the copy
    is over by the clock, and a host that runs ahead of the device by a whole pass would find none of it free again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, *after: object) -> object:
        for mark in after:
            if isinstance(mark, torch.cuda.Event):
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: object) -> None:
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> object:
        return torch.cuda.current_stream(self._device).record_event()


def lane_to(device: torch.device) -> Lane:
    """Returns a lane for a device."""
    return CudaLane(device) if device.type == "cuda" else DirectLane()
