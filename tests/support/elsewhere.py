"""What Windows lacks, taken away from a command and all its children, by a folder from which Python starts.

A simulation: it shows that nothing relies on what is absent there, not what Windows does instead.
"""

import os
from pathlib import Path

_TAKE_AWAY = '''\
"""Run by Python when it starts: this system has neither Unix's modules nor what `os` and `signal` have of it."""
import errno
import os
import signal
import sys

ABSENT = {
    os: "O_NONBLOCK O_NOFOLLOW getuid geteuid getpgid killpg mkfifo posix_fadvise pread preadv pwrite pwritev "
    "sched_getaffinity sched_setaffinity set_blocking setsid sync",
    signal: "pthread_sigmask sigwait pthread_kill",
}
for module, names in ABSENT.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None


def link(*_, **__):
    raise OSError(errno.EINVAL, "this file system has no links")


os.link = os.symlink = link
'''


def as_elsewhere(folder: Path) -> dict[str, str]:
    """Returns the variables with which Python and all the processes that it starts lack them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_TAKE_AWAY, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
