"""Whether T5 is held whole or read block by block: a question of the memory that is there."""

import math
from pathlib import Path
from typing import Literal

import torch

from sd3pipe.models.sources import ComponentSource

_ROOM = 1.15  # of the weights' bytes
_ACTIVATION_BYTES = 2 << 30  # what a batch of T5-XXL takes beside the weights


def streams_t5(
    wish: Literal["auto", "on", "off"], source: ComponentSource, dtype: torch.dtype, device: torch.device
) -> bool:
    """Returns whether T5 is to be read block by block: with "auto", where it would not fit with room to spare."""
    if wish != "auto":
        return wish == "on"
    weights = sum(math.prod(shape) for shape in source.shapes().values()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return free is not None and _ROOM * weights + _ACTIVATION_BYTES > free


def available_memory(system: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still get: the system's, or less in a container; None if not told."""
    known = [free for free in (_system_memory(system), _container_memory(system)) if free is not None]
    return min(known, default=None)


def _system_memory(system: Path) -> int | None:
    values = _numbers(system / "proc/meminfo")
    return values["MemAvailable:"] * 1024 if "MemAvailable:" in values else None


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
