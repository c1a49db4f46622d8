"""Host memory that a GPU can read by itself, with a fallback where the system does not allow it."""

import contextlib
import logging
import mmap
import weakref

import torch
from torch import Tensor

from sd3pipe.device_memory import share_of_memory

log = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 30  # stays unlocked: locked pages can never be given to other programs, nor to this one's rows


class HostMemory:
    """Hands out flat host buffers, page-locked for `device` where that is CUDA.

    Buffers have pages of their own and are registered with cudaHostRegister at their exact size: torch's pinned
    allocator rounds up to a power of two, which costs 86 MB on each 426 MB block of SD3.5-large. Where the system
    refuses, or the host would have less than 1 GB left, that is told in one line; from then on buffers are pageable,
    and copies from them slower. Page-locked buffers live as long as this object, or until `close`, after which they are
    ordinary memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: list[Tensor] = []
        self.pinned = device.type == "cuda"
        self._unlock = weakref.finalize(self, _unlock, device, self._locked)

    def close(self) -> None:
        """Unlocks the pages of all buffers, after the copies that are under way."""
        self._unlock()

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are page-locked now."""
        return sum(buffer.numel() for buffer in self._locked)

    def buffer(self, nbytes: int) -> Tensor:
        """Returns `nbytes` of memory as uint8."""
        if not self.pinned or not nbytes:
            return torch.empty(nbytes, dtype=torch.uint8)
        left = share_of_memory()
        if left is not None and left < nbytes + _SPARE_BYTES:
            self._go_on_pageable(f"the host has {left / 1e9:.1f} GB of memory left", "")
            return torch.empty(nbytes, dtype=torch.uint8)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        assert runtime is not None
        with torch.cuda.device(self._device):
            error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if not error:
            self._locked.append(memory)
            return memory
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)  # the next kernel's check takes the error off CUDA's record
        self._go_on_pageable(
            f"the system does not page-lock more host memory (CUDA error {error})", "raise `ulimit -l`, "
        )
        return memory

    def _go_on_pageable(self, reason: str, way_out: str) -> None:
        self.pinned = False
        log.warning(
            "%s: after %.1f GB, streamed blocks and activations are copied from pageable memory, which is slower; "
            "%sfree memory, stream fewer blocks or pack the base: --base-dtype int8",
            reason,
            self.pinned_bytes / 1e9,
            way_out,
        )


def _unlock(device: torch.device, locked: list[Tensor]) -> None:
    if locked:
        torch.cuda.synchronize(device)
        runtime = torch.cuda.cudart()
        assert runtime is not None
        for memory in locked:
            runtime.cudaHostUnregister(memory.data_ptr())
        locked.clear()
