"""Which process this is, and whether a process that left its mark in a file's name still lives."""

import contextlib
import os
import socket
import uuid
from functools import cache
from pathlib import Path

_PROC = Path("/proc")  # of Linux
MARK = r"\d+-\d*-[0-9a-f]{16}-[0-9a-f]{16}"  # process number, its start, machine, what makes the mark unique


def process_mark(pid: int | None = None) -> str:
    """Returns a new mark of this process, or of another: part of the name of what it writes until it is done."""
    pid = os.getpid() if pid is None else pid
    return f"{pid}-{_start_of(pid)}-{_machine()}-{uuid.uuid4().hex[:16]}"


def is_alive(mark: str) -> bool | None:
    """Whether the process of a mark lives; None if it ran on another machine, or nothing here tells."""
    pid, started, machine, *_ = [*mark.split("-"), "", "", ""]
    if not (pid.isdigit() and started and machine == _machine()):
        return None
    return _start_of(int(pid)) == started or _is_hidden(int(pid))


def living_pid(mark: str) -> int | None:
    """Returns the number of the process of a mark if it lives on this machine, else None."""
    return int(mark.partition("-")[0]) if is_alive(mark) else None


@cache
def _machine() -> str:
    """Returns what tells machines apart, also those of one name, and containers that number processes apart.

    A machine that was started again counts as another one: its process numbers began anew.
    """
    import hashlib  # loads OpenSSL, 4 MB that `sd3pipe --help` needs nothing of

    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()


def _start_of(pid: int) -> str:
    """Returns when a living process started, in the kernel's ticks since boot; empty if it is dead."""
    if not _PROC.exists():
        return _start_elsewhere(pid)
    with contextlib.suppress(OSError, IndexError, ValueError):
        state, *numbers = Path(_PROC, str(pid), "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return numbers[18] if state not in "ZX" else ""
    return ""


def _start_elsewhere(pid: int) -> str:
    """Returns when a living process started, in milliseconds, on Windows and on Macs; empty if it is dead."""
    import psutil  # accelerate brings it; slow to import, and Linux needs it not

    with contextlib.suppress(psutil.Error, OverflowError):
        process = psutil.Process(pid)
        return str(int(process.create_time() * 1000)) if process.status() != psutil.STATUS_ZOMBIE else ""
    return ""


def _is_hidden(pid: int) -> bool:
    """Whether a process lives that this user may not look at. Asked only on Linux: Windows knows no signal 0."""
    if not _PROC.exists():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not (_PROC / str(pid)).exists()
    except (OSError, OverflowError):
        return False
    return False
