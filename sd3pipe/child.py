"""Runs one of the package's own commands in a process of its own, and leaves to it how to stop."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from sd3pipe.errors import ExitCode, Sd3pipeError


class ChildFailed(Sd3pipeError):
    """A command ended with an exit code of its own, which becomes that of the command that ran it."""

    def __init__(self, what: str, code: int, same_command: str) -> None:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"{what} {ended}: `{same_command}` goes on from there")
        self.exit_code = code if code > 0 else ExitCode.STOPPED


def run_child(arguments: Sequence[str], folder: Path | None = None) -> int:
    """Runs `sd3pipe ARGUMENTS`, in `folder` if given, and returns its exit code; negative: ended by that signal.

    Ctrl-C and SIGTERM are handed on and waited for: the command finishes its step, saves, and says so itself.
    """
    child = subprocess.Popen([sys.executable, "-m", "sd3pipe", *arguments], cwd=folder)
    with _signals_handed_on(child):
        return child.wait()


@contextlib.contextmanager
def _signals_handed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)  # from a terminal it comes a second time, at once, which counts as the same

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
