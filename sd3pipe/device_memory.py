"""How much memory there is, how much this process has used at most, and what to say when there is too little."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sd3pipe.errors import DeviceMemoryError

# What the libraries below torch (cuBLAS, cuDNN, the driver) say when the card or the host has no memory left; torch's
# own allocator has a class.
_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
_USABLE = 0.92  # of the free device memory; the rest is for fragmentation and sample pictures
_DESKTOP_BYTES = 500_000_000  # that other programs with windows may come to want


@contextlib.contextmanager
def memory_errors(way_out: Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory, on the device or the host, into a DeviceMemoryError that says what to do."""
    try:
        yield
    except MemoryError as error:
        raise DeviceMemoryError(f"the host ran out of memory: {way_out()}") from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        where = "host" if "CPUAllocator" in str(error) else "device"
        raise DeviceMemoryError(f"the {where} ran out of memory: {way_out()}") from error


def decode_way_out(device: torch.device) -> str:
    """Returns what to do where even a strip of a picture could not be decoded."""
    return "pass --device cpu" if device.type == "cuda" else "free some of it, or decode smaller pictures"


def usable_device_bytes(device: torch.device) -> int:
    """Returns what may be planned with of the memory that is free on a CUDA device."""
    free = torch.cuda.mem_get_info(device)[0]
    return max(0, min(int(_USABLE * free), free - _DESKTOP_BYTES))


def peak_device_bytes(device: torch.device) -> int:
    """Returns the most memory that torch held on a CUDA device; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_rss_bytes() -> int:
    """Returns the most memory that this process has held on the CPU; 0 where the system does not say.

    Linux counts it anew for each program in /proc; getrusage also counts the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def share_of_memory() -> int | None:
    """Returns what each of the processes that torchrun started on this machine can still get; None if not told."""
    free = available_memory()
    return None if free is None else free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_memory(system: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still get: the system's, or less in a container; None if not told."""
    kilobytes = _numbers(system / "proc/meminfo").get("MemAvailable:")
    free = (None if kilobytes is None else kilobytes * 1024, _container_memory(system))
    return min((known for known in free if known is not None), default=None)


def _container_memory(system: Path) -> int | None:
    """Returns what a control group (version 2) still allows; pages of read files can be given back."""
    folder = system / "sys/fs/cgroup"
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none, or "max"
        return None
    return max(0, limit - used + _numbers(folder / "memory.stat").get("inactive_file", 0))


def _numbers(file: Path) -> dict[str, int]:
    """Returns the lines "name number" of one of the kernel's files."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
