"""Stopping on purpose: Ctrl-C, SIGTERM and a time limit end the step at hand, not the process."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

_SAME_WISH_SECONDS = 1.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Returns seconds from "90", "90s", "15m", "1.5h" or "2d"."""
    return float(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else float(text)


class StopRequest:
    """Catches SIGINT and SIGTERM while it is open; `reason` says why to stop, "" means go on.

    A second signal takes its usual course, so that a step that hangs can still be interrupted; one that comes at once
    is the same wish, which a process and its group were both told.
    """

    def __init__(self, time_limit_seconds: float | None = None) -> None:
        self._signal, self._since = "", 0.0
        self._end = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        self._handlers: dict[int, object] = {}

    @property
    def reason(self) -> str:
        if not self._signal and self._end is not None and time.monotonic() >= self._end:
            return "time limit"
        return self._signal

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self._signal:
            self._signal, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > _SAME_WISH_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()
