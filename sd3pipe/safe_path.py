"""Keeps modules that lie in the current folder from being imported, here and in every process that this one starts.

Python puts the current folder first where it looks for modules: for `python -m`, for `python -c` (multiprocessing's
workers), and for an empty entry of PYTHONPATH. A `typer.py` in a folder from a stranger would run. This module comes
before all others, so it imports only what every Python has loaded when it starts.
"""

import os
import sys

import sd3pipe


def leave_current_folder_out() -> None:
    """Takes out of sys.path what Python derives from the current folder, and tells all processes below to do without.

    This package's own modules are found all the same, in its __path__. Workers look for the package anew: where it lies
    in the current folder and is not installed, that folder goes to the end, in front of nothing. So does the current
    folder where an installation or an absolute PYTHONPATH names it.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    search_path = os.environ.get("PYTHONPATH")
    if search_path:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(os.path.isabs, search_path.split(os.pathsep)))
    if not sys.flags.safe_path and sys.path and _is_current_folder(sys.path[0]):
        del sys.path[0]
    sys.path[:] = sorted(filter(os.path.isabs, sys.path), key=_is_current_folder)
    home = os.path.dirname(os.path.dirname(os.path.realpath(sd3pipe.__file__)))
    if home not in map(os.path.realpath, sys.path):
        sys.path.append(home)


def _is_current_folder(entry: str) -> bool:
    try:
        return os.path.samefile(entry or os.curdir, os.curdir)
    except OSError:  # the inside of an archive, or a current folder that was deleted
        return False
