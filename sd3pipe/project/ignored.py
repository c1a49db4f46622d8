"""What a project keeps out of git and out of DVC's hashes."""

import re
from collections.abc import Iterable
from pathlib import Path

from sd3pipe.data.dataset_file import CONTAINER_ENDINGS

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


def gitignore(run: str, pictures: Iterable[str]) -> str:
    """Returns .gitignore: pictures inside the project are for rsync or `dvc add`, not for git's history.

    Runs that were set aside end in a number; a `run` of the project's own whose name does so is kept.
    """
    numbered = re.fullmatch(r"runs/[^/]*\.[1-9][0-9]?", run)
    kept = [f"!/{_escaped(run)}/\n"] if numbered else []
    inside = [f"/{_escaped(path)}{_slash(path)}\n" for path in pictures if not Path(path).is_absolute()]
    return "".join([_GITIGNORE, *kept, *inside])


def _slash(path: str) -> str:
    """Returns what a pattern ends in that stands for folders alone."""
    return "" if path.lower().endswith(CONTAINER_ENDINGS) else "/"


def _escaped(path: str) -> str:
    """Returns a path as a pattern that stands for itself alone."""
    return re.sub(r"[\\*?\[]|\s$", r"\\\g<0>", path)
