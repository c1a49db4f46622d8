"""The device to compute on. Imports torch, so commands import it when they have something to compute."""

import contextlib
import logging
import os
from pathlib import Path

import torch

from sd3pipe.cores import thread_count
from sd3pipe.errors import ParameterError

_KINDS = ("cpu", "cuda", "mps")

log = logging.getLogger(__name__)


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """Returns the device that `--device` names and sets the number of CPU threads.

    `auto` is CUDA where torch can use it, else the CPU; a Mac's GPU is taken when it is named, mps. An NVIDIA card that
    this torch build cannot use is named in a warning. A CUDA device has its number and becomes the current one.
    `threads` = None leaves the number to OMP_NUM_THREADS, or else takes all cores that this process may use.
    Raises ParameterError for an unknown or absent device.
    """
    torch.set_num_threads(thread_count(threads))
    if name == "auto":
        if torch.cuda.is_available():
            rank = int(os.environ.get("LOCAL_RANK", "0"))  # under torchrun, each process takes a card of its own
            return _current(rank % torch.cuda.device_count())
        if has_nvidia_card():
            log.warning("there is an NVIDIA card, but %s; going on with the CPU", _why_no_cuda())
        return torch.device("cpu")
    device = _named(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ParameterError(f"--device {name}: torch {torch.__version__} finds no GPU of a Mac here: use auto or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"--device {name}: {_why_no_cuda()}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0"
        )
    return _current(device.index or 0) if device.type == "cuda" else device


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns in what sums over a run are taken: float64, which a Mac's GPU has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def has_bfloat16() -> bool:
    """Returns whether the current CUDA device computes in bfloat16 itself: cards from 2020 on do."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def has_nvidia_card() -> bool:
    """Returns whether the machine's driver shows an NVIDIA card (Linux, WSL2), whatever torch can do."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/gpus", "/dev/nvidia0", "/dev/dxg"))


def _named(name: str) -> torch.device:
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type in _KINDS:
            return device
    raise ParameterError(f"--device {name}: unknown device: use auto, cpu, cuda, cuda:N or mps")


def _current(index: int) -> torch.device:
    """Returns a CUDA device as tensors tell it, and lets libraries that ask for the current device find it."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: install a CUDA build as pytorch.org/get-started says, "
            "then run again"
        )
    return f"torch {torch.__version__} finds no usable CUDA device: check the driver with nvidia-smi"
