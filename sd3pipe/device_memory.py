"""How much memory this process has used at most."""

import contextlib
import sys
from pathlib import Path

import torch


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
