"""Stopping on purpose: Ctrl-C, SIGTERM and SIGHUP leave a wish that no library swallows, and the program looks at it.

A handler that raised would do so anywhere: inside an import, which leaves half a module behind, or below a library's
own `except`, which loses the wish. So a signal only notes it, and says at once that it was heard. Whatever takes its
time calls `check` between its steps, batches, files or tensors; where a library waits for others, `breaking_off` lets
the signal end the waiting. A second signal, a moment later, ends the process there and then.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from sd3pipe.errors import Stopped

# Ctrl-C, SIGTERM and, of a terminal that is gone, SIGHUP; on Windows, where nobody else can send those, Ctrl-Break.
SIGNALS = tuple(
    signal.Signals(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)
_HANGUP = getattr(signal, "SIGHUP", None)
_SAME_WISH_SECONDS = 1.0  # a process and its group are often told both


class _Ears:
    """What this process has heard. A handler waits for the main thread, the thread that watches answers at once."""

    def __init__(self) -> None:
        self.reason = ""
        self.may_break_off = False
        self.hand_on: Callable[[int], None] | None = None
        self._heard_at = 0.0
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._told, self._teller = socket.socketpair()  # Windows makes no pipe that does not block

    def open(self) -> None:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        self._teller.setblocking(False)
        signal.set_wakeup_fd(self._teller.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self.take_signals()

    def take_signals(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # whoever started this process may have held them back

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._teller.close()  # which ends the watching

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._leave_terminals(number)
        self.reason = self.reason or signal.Signals(number).name
        if self.may_break_off:
            raise Stopped(_message(self.reason))

    def _watch(self) -> None:
        while numbers := self._told.recv(64):
            for number in numbers:
                if number in self._before:
                    self._hear(number)
        self._told.close()

    def _hear(self, number: int) -> None:
        now, first = time.monotonic(), not self._heard_at
        self._heard_at = self._heard_at or now
        self._leave_terminals(number)
        self.reason = self.reason or signal.Signals(number).name
        if self.hand_on is not None:
            self.hand_on(number)
        elif first:
            with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
                print(f"{self.reason}: stopping after what is under way; once more ends at once", file=sys.stderr)
        elif now - self._heard_at > _SAME_WISH_SECONDS:
            os._exit(128 + number)  # as shells count a death by a signal; the main thread may be deep in a library

    def _leave_terminals(self, number: int) -> None:
        """Sends nowhere what would go to a terminal that is gone: to write there is an error, before all is saved."""
        if number != _HANGUP:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)


_ears: _Ears | None = None


def listen() -> bool:
    """Hears signals that ask to stop from here on, and returns whether it did not before.

    A signal that this process was started to ignore stays ignored. Only the main thread can listen.
    """
    global _ears
    if _ears is not None or threading.current_thread() is not threading.main_thread():
        return False
    _ears = _Ears()
    _ears.open()
    return True


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens for the length of a block, unless somebody listens already."""
    global _ears
    began = listen()
    try:
        yield
    finally:
        if began and _ears is not None:
            _ears.close()
            _ears = None


def listen_again() -> None:
    """Takes the signals back from a library that took them."""
    if _ears is not None:
        _ears.take_signals()


def reason() -> str:
    """Returns the name of the signal that asked to stop, "" as long as none did."""
    return _ears.reason if _ears is not None else ""


def check() -> None:
    """Raises Stopped if the user asked to stop. Call it wherever nothing is lost by ending here."""
    if _ears is not None and _ears.reason:
        raise Stopped(_message(_ears.reason))


@contextlib.contextmanager
def breaking_off() -> Iterator[None]:
    """Lets a signal raise Stopped anywhere in a block: for waiting on others, where no import and no write is cut."""
    check()
    if _ears is None:
        yield
        return
    _ears.may_break_off = True
    try:
        yield
    finally:
        _ears.may_break_off = False


@contextlib.contextmanager
def handing_on(hand_on: Callable[[int], None]) -> Iterator[None]:
    """Gives each signal to `hand_on` as well, also one that was just heard; whoever gets it there is to answer it."""
    if _ears is None:
        yield
        return
    _ears.hand_on = hand_on
    if _ears.reason:
        hand_on(signal.Signals[_ears.reason])
    try:
        yield
    finally:
        _ears.hand_on = None


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keeps signals waiting until somebody can answer them: a child takes this over, and ends it by listening."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Ignores these signals, in a worker process that its parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _message(name: str) -> str:
    return f"stopped by {name}: the same command goes on from here"
