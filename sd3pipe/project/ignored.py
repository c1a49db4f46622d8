"""What a project keeps out of git and out of DVC's hashes."""

import re
from collections.abc import Iterable
from pathlib import Path

DVCIGNORE = ".sd3pipe/\n*.report.json\n"
# Caches, exports and all of a run but its figures, which DVC reads from git; what `preview`, `sample` and DVC draw.
_GITIGNORE = """\
/caches/
/exports/
/runs/*/*
!/runs/*/metrics.json
!/runs/*/plots/
/runs/*.[1-9]/
/runs/*.[1-9][0-9]/
/preview/
/samples/
/sheets/
/dvc_plots/
*.report.json
.sd3pipe/
*.safetensors
"""


def gitignore(run: str, picture_folders: Iterable[str]) -> str:
    """Returns .gitignore: pictures inside the project are for rsync or `dvc add`, not for git's history.

    Runs that were set aside end in a number; a `run` of the project's own whose name does so is kept.
    """
    numbered = re.fullmatch(r"runs/[^/]*\.[1-9][0-9]?", run)
    kept = [f"!/{_escaped(run)}/\n"] if numbered else []
    inside = [f"/{_escaped(folder)}/\n" for folder in picture_folders if not Path(folder).is_absolute()]
    return "".join([_GITIGNORE, *kept, *inside])


def _escaped(path: str) -> str:
    """Returns a path as a pattern that stands for itself alone."""
    return re.sub(r"[\\*?\[]|\s$", r"\\\g<0>", path)
