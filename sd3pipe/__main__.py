"""The program's door, as `sd3pipe` and as `python -m sd3pipe`: what lies in the current folder is shut out first."""

import os
import sys

if not __package__:  # started by its path, as child.py does: the package is the folder around this file, and no other
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import sd3pipe  # noqa: F401 (its __init__ is empty, so nothing else is sought there)

    del sys.path[0]

from sd3pipe import safe_path

safe_path.leave_current_folder_out()

from sd3pipe import stopping  # noqa: E402 (whatever is imported must not come from the current folder)


def main() -> None:
    """Runs the command line, and hears signals before the long imports begin and until the process has ended."""
    stopping.listen()
    from sd3pipe import cli

    cli.main()


if __name__ == "__main__":
    main()
