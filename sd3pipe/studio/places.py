"""Where a project keeps what the studio reads and writes."""

from pathlib import Path

from sd3pipe.cache.folder import machine_folder
from sd3pipe.config import Project
from sd3pipe.errors import InputError
from sd3pipe.judgement import JUDGE_FOLDER


def studio_folder(project: Project) -> Path:
    """Returns where the studio keeps what can be made again or is of this machine alone: thumbnails, logs, undo."""
    return machine_folder(path_of(project, "caches") / "studio")


def path_of(project: Project, key: str) -> Path:
    """Returns a path of project.toml. Raises InputError where it is missing."""
    if key not in project.paths:
        raise InputError(f"{project.file}: paths.{key} is missing")
    return Path(project.paths[key])


def judge_folder(project: Project, run: Path) -> Path:
    """Returns where `judge` writes what it finds of a run: in it, or where the project says so of its own."""
    own = project.paths.get("judge") if run == path_of(project, "run") else None
    return Path(own) if own else run / JUDGE_FOLDER
