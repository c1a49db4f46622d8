"""Runs one of the package's own commands in a process of its own, and leaves to it how to stop."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3pipe import stopping
from sd3pipe.errors import ExitCode, Sd3pipeError, Stopped
from sd3pipe.files import appending
from sd3pipe.living import living_pid, process_mark

GOES_ON = "` goes on from there"  # how a line ends that tells of a child, which has told the reason itself
_ON_A_CONSOLE = hasattr(signal, "CTRL_BREAK_EVENT")  # Windows
_WISH = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
_PROGRAM = Path(__file__).with_name("__main__.py")  # by path: no other folder named sd3pipe is taken for it


class ChildFailed(Sd3pipeError):
    """A command ended with an exit code of its own, which becomes that of the command that ran it."""

    def __init__(self, what: str, code: int, same_command: str) -> None:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"{what} {ended}: `{same_command}{GOES_ON}")
        self.exit_code = code if code > 0 else ExitCode.STOPPED


def run_child(what: str, arguments: Sequence[str], *, same_command: str, folder: Path | None = None) -> None:
    """Runs `sd3pipe ARGUMENTS`, in `folder` if given. Raises Stopped where it was stopped on purpose, else ChildFailed.

    `what` and `same_command` are for the message: what was run, and what to run again. Signals that ask to stop are
    handed on and waited for: the command finishes its step, saves, and says so itself.
    """
    stopping.check()
    code = _exit_code(_command(arguments), folder)
    if code == ExitCode.DONE:
        return
    if code == ExitCode.STOPPED or stopping.reason() or -code in stopping.SIGNALS:
        raise Stopped(f"{what} was stopped: `{same_command}{GOES_ON}")
    raise ChildFailed(what, code, same_command)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detached:
    """A command that outlives whoever started it; its mark finds it again (see living.py)."""

    process: subprocess.Popen[bytes]
    mark: str


def start_detached(arguments: Sequence[str], *, folder: Path, log: Path) -> Detached:
    """Starts `sd3pipe ARGUMENTS` in a session of its own; what it prints is added to `log`.

    Raises OSError where `folder` is gone, StorageError.
    """
    with appending(log) as file:
        process = subprocess.Popen(
            _command(arguments),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    return Detached(process=process, mark=process_mark(process.pid))


def ask_to_stop(mark: str) -> bool:
    """Asks the process of a mark to stop, as Ctrl-C does; returns whether it lives here.

    By SIGTERM: what a shell starts in the background is started to ignore Ctrl-C, and so is what that starts. On
    Windows by Ctrl-Break, the only wish that can be told to one process and not to all of its console.
    """
    pid = living_pid(mark)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, _WISH)
    return pid is not None


def run_captured(arguments: Sequence[str], *, folder: Path | None = None) -> tuple[int, str]:
    """Runs `sd3pipe ARGUMENTS` to its end; returns its exit code and what it printed."""
    done = subprocess.run(
        _command(arguments),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", str(_PROGRAM), *arguments]


def _heard_by_all(number: int) -> None:
    """Hands nothing on: a console tells each of its processes, and on Windows nobody else tells."""


def _exit_code(command: Sequence[str], folder: Path | None) -> int:
    with contextlib.ExitStack() as handed_on:
        with stopping.held_back():
            child = subprocess.Popen(command, cwd=folder)
            handed_on.enter_context(stopping.handing_on(_heard_by_all if _ON_A_CONSOLE else child.send_signal))
        return child.wait()
