"""How bytes get between host and device: on a stream of their own with CUDA, at once without it.

As with CUDA, an event stands for "everything asked for so far is done"; waiting for one never stops the host.
"""

import torch
from torch import Tensor


class CopyStream:
    """Copies in one direction, in order: here at once, so that nothing is ever pending and events mean nothing."""

    def copy(self, target: Tensor, source: Tensor, *after: object) -> object:
        """Copies once all of `after` have happened; returns the event of the copy.

        Both tensors have to live until the computation has been made to wait for that event: nothing here keeps them.
        """
        target.copy_(source)
        return None

    def wait(self, event: object) -> None:
        """Makes the computation that follows wait for a copy's event."""

    def finish(self, event: object) -> None:
        """Makes the host wait for a copy's event. May be called from another thread."""

    def record_event(self) -> object:
        """Returns an event of all computation so far, for a later copy to wait for."""
        return None


class CudaCopyStream(CopyStream):
    """Copies on a stream of its own, beside the computation, ordered against it by events alone.

    Tensors are not told of the stream (record_stream): torch would then keep the memory of a dropped one until the copy
    is over by the clock, and a host that runs ahead of the device by a whole pass would find none of it free again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, *after: object) -> object:
        for event in after:
            if isinstance(event, torch.cuda.Event):
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: object) -> None:
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self, event: object) -> None:
        if isinstance(event, torch.cuda.Event):
            event.synchronize()

    def record_event(self) -> object:
        return torch.cuda.current_stream(self._device).record_event()


def copy_stream_to(device: torch.device) -> CopyStream:
    """Returns a copy stream for a device."""
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream()
