"""Host memory that a GPU can read by itself, with a fallback where the system does not allow it."""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class HostMemory:
    """Hands out flat host buffers, page-locked for `device` where that is CUDA.

    Buffers are registered with cudaHostRegister at their exact size: torch's own pinned allocator rounds up to a power
    of two, which costs 86 MB on each 426 MB block of SD3.5-large. The first failure is told in one line; from then on
    buffers are plain memory, and copies from them slower.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.pinned = device.type == "cuda"
        self.pinned_bytes = 0

    def buffer(self, nbytes: int) -> Tensor:
        """Returns `nbytes` of uninitialised memory as uint8."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        if self.pinned and nbytes:
            self._pin(memory)
        return memory

    def _pin(self, memory: Tensor) -> None:
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if error:
            self.pinned = False
            log.warning(
                "the system does not page-lock more than %.1f GB of host memory (CUDA error %d): "
                "the other streamed blocks are copied from pageable memory, which is slower; "
                "raise `ulimit -l`, free memory or stream fewer blocks",
                self.pinned_bytes / 1e9,
                error,
            )
            return
        self.pinned_bytes += memory.numel()
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
