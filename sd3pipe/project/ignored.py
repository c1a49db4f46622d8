"""What a project keeps out of git and out of DVC's hashes."""

from collections.abc import Iterable
from pathlib import Path

DVCIGNORE = ".sd3pipe/\n*.report.json\n"
_GITIGNORE = """\
/caches/
/exports/
/runs/*/*
!/runs/*/metrics.json
!/runs/*/plots/
*.report.json
.sd3pipe/
*.safetensors
"""


def gitignore(picture_folders: Iterable[str]) -> str:
    """Returns .gitignore: pictures inside the project are for rsync or `dvc add`, not for git's history."""
    return _GITIGNORE + "".join(f"/{folder}/\n" for folder in picture_folders if not Path(folder).is_absolute())
