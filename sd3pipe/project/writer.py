"""Writes the files of a new project, all or none."""

from collections.abc import Mapping
from pathlib import Path

from sd3pipe.errors import ParameterError
from sd3pipe.files import make_folder, write_text
from sd3pipe.params.stage_file import toml_value


def project_toml(paths: Mapping[str, str]) -> str:
    """Returns the text of project.toml."""
    lines = [f"{key} = {toml_value(value)}" for key, value in paths.items()]
    return "\n".join(
        ["# Where things are; relative paths start here. dvc.yaml reads this file, too.", "[paths]", *lines, ""]
    )


def write_project(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes `texts` by their names below `folder`. Raises ParameterError if one exists already; overwrites nothing."""
    there = [name for name in texts if (folder / name).exists()]
    if there:
        raise ParameterError(f"{folder}: {', '.join(there)} exist already and are not overwritten: name another folder")
    for name, text in texts.items():
        make_folder((folder / name).parent)
        write_text(folder / name, text)
