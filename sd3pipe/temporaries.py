"""Names for what is not finished yet, and the end of what killed processes have left under such names."""

import contextlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

from sd3pipe.living import MARK, is_alive, process_mark

log = logging.getLogger(__name__)

FOREIGN_SECONDS = 86_400.0  # what a process of another machine has not touched for a day, nobody writes

_PREFIX = "tmp-sd3pipe-"
_NAME = re.compile(re.escape(_PREFIX) + f"({MARK})")
_cleared: set[str] = set()
if hasattr(os, "register_at_fork"):  # absent on Windows
    os.register_at_fork(after_in_child=_cleared.clear)


def temporary_name(folder: Path) -> Path:
    """Returns an unused path in `folder`, after removing what dead processes have left there under such names.

    The name says which process writes. It is short whatever the name will be in the end, and has no ending that
    another program looks for.
    """
    _clear(folder)
    return folder / f"{_PREFIX}{process_mark()}"


def remove_tree(path: Path) -> None:
    """Removes a file or a folder with its content; what is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Removes what is left from dead processes, once in the life of this one: a folder may hold many files."""
    real = os.path.realpath(folder)
    if real in _cleared:
        return
    _cleared.add(real)
    with contextlib.suppress(OSError):
        for path in Path(real).iterdir():
            match = _NAME.fullmatch(path.name)
            if match and not _is_written(path, match[1]):
                log.info("%s: removed, a killed process has left it", folder / path.name)
                with contextlib.suppress(OSError):
                    remove_tree(path)


def _is_written(path: Path, mark: str) -> bool:
    lives = is_alive(mark)
    return time.time() - _last_change(path) < FOREIGN_SECONDS if lives is None else lives


def _last_change(path: Path) -> float:
    """Returns when anything in a file or folder was last written; now where that cannot be seen."""
    try:
        return max(inner.lstat().st_mtime for inner in (path, *path.rglob("*")))
    except OSError:
        return time.time()
