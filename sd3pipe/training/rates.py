"""What a machine achieves: its copy bandwidth, and its speed in a joint block of the real shape."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from sd3pipe.memory.eight_bit import block_packing
from sd3pipe.memory.host import HostMemory
from sd3pipe.memory.plan import Rates, Settings, Workload
from sd3pipe.memory.quantise import quantise_as
from sd3pipe.memory.sizes import model_size
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.joint_block import JointBlock

COPY_BYTES = 128 << 20
READ_BYTES = 256 << 20
_PIECE_BYTES = 8 << 20
_REPEATS = 5


def measure_rates(
    architecture: MMDiTArchitecture,
    work: Workload,
    settings: Settings = Settings(),
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Rates:
    """Returns the copy bandwidth, and the operations per second of the middle block's forward pass, random weights.

    Of `settings`, those count by which the block's products are taken in eight bits.
    """
    middle = architecture.depth // 2
    block = JointBlock(architecture, middle, device, dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    products = block_packing(settings, device) if settings.matmul_dtype is not None else None
    if products is not None:
        quantise_as(block, products)
    width = architecture.width
    context = torch.randn(work.batch, work.text_tokens, width, device=device, dtype=dtype)
    x = torch.randn(work.batch, work.image_tokens, width, device=device, dtype=dtype)
    with torch.no_grad():
        modulation = block.modulation(torch.randn(work.batch, width, device=device, dtype=dtype))
        seconds = _seconds(lambda: block(context, x, *modulation), device)
    model = model_size(architecture.shapes())
    operations = model.block_flop(middle, work.batch, work.image_tokens, work.text_tokens)
    copies = COPY_BYTES / copy_seconds(device)
    return Rates(flop_per_second=operations / seconds, copy_bytes_per_second=copies)


def measure_reading(files: Sequence[Path]) -> float:
    """Returns the bytes per second that come from the disk with the largest of the files, which is read in part."""
    path = max(files, key=lambda file: file.stat().st_size)
    count = min(READ_BYTES, path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # what the system still has in memory would tell of that
            os.posix_fadvise(file.fileno(), 0, count, os.POSIX_FADV_DONTNEED)
        piece = bytearray(_PIECE_BYTES)
        start = time.perf_counter()
        done = 0
        while done < count and (read := file.readinto(piece)):
            done += read
    return max(1, done) / max(1e-9, time.perf_counter() - start)


def copy_seconds(device: torch.device) -> float:
    """Returns the seconds that a copy of COPY_BYTES takes from page-locked memory."""
    memory = HostMemory(device)  # which unlocks its buffers when it goes
    source = memory.buffer(COPY_BYTES)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call, the first one apart."""
    action()
    _wait(device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    _wait(device)
    return (time.perf_counter() - start) / _REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
