"""Notices when a driver moves a full card's memory to the host, which Windows does in silence."""

import logging
import statistics
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_SLOWER = 3.0  # times the usual step; memory over PCIe is ten to thirty times slower than the card's own
_IN_A_ROW = 3  # one slow step may be a second size of picture that is compiled
_USUAL_FROM = 10  # steps that tell what is usual
_FULL = 0.05  # free share of the card's memory, below which it counts as full


class SpillWatch:
    """Warns once of steps that become several times slower while the device is full."""

    def __init__(self, is_full: Callable[[], bool]) -> None:
        self._is_full = is_full
        self._usual: list[float] = []
        self._slow = 0

    def see(self, seconds: float) -> None:
        """Takes note of one step's time."""
        if len(self._usual) < _USUAL_FROM:
            self._usual.append(seconds)
            return
        usual = statistics.median(self._usual)
        self._slow = self._slow + 1 if seconds > _SLOWER * usual else 0
        if self._slow == _IN_A_ROW and self._is_full():
            log.warning(
                "steps take %.1f s instead of %.1f s, and the card is full: its driver moves memory to the host. "
                "Stop other programs on the card, or stream or recompute more blocks (`sd3pipe plan`)",
                seconds,
                usual,
            )


def device_is_full(device: torch.device) -> bool:
    """Returns whether next to nothing of a CUDA device's memory is free."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < _FULL * total
