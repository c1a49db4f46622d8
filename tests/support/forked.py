"""Runs functions in forked processes that can be killed at any moment."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable


def start(act: Callable[[], object]) -> int:
    """Returns the id of a process that runs `act`; its exit code is 0 if `act` returned, or what it exited with."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            act()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    return process


def exit_code(process: int) -> int:
    """Waits for a process and returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float) -> bool:
    """Sends SIGKILL after a while and waits; returns whether that ended the process."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return exit_code(process) == -signal.SIGKILL
