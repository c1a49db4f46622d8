"""Reads the TOML files of a project: project.toml with its paths, and one parameter file per stage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3pipe import documents
from sd3pipe.documents import DocumentError
from sd3pipe.errors import ParameterError
from sd3pipe.stages import HUB_KEYS

PROJECT_FILE = "project.toml"
KEPT_TABLES = ("subsets",)  # the one table that is a value; all others are headings


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A folder with a project.toml; `paths` holds its [paths] with relative ones taken from that folder."""

    folder: Path
    paths: Mapping[str, str]

    @property
    def file(self) -> Path:
        return self.folder / PROJECT_FILE

    def stage_file(self, command: str) -> Path:
        """Returns where the parameter file of a command lies, whether or not it exists."""
        return self.folder / "stages" / f"{command.replace('-', '_')}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file. Raises ParameterError with file and line."""
    try:
        return documents.read_toml(path)
    except DocumentError as error:
        raise ParameterError(str(error)) from error


def flatten(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys of all tables as one list: table names are headings only, but for [subsets.NAME]."""
    for key, value in tables.items():
        if isinstance(value, Mapping) and key not in KEPT_TABLES:
            yield from flatten(value)
        else:
            yield key, value


def find_project(start: Path) -> Project | None:
    """Returns the project that `start` or the nearest folder above it holds, or None. Raises ParameterError."""
    for folder in (start, *start.parents):
        if (folder / PROJECT_FILE).is_file():
            return read_project(folder)
    return None


def read_project(folder: Path) -> Project:
    """Returns the project of a folder. Raises ParameterError if project.toml is not what it should be."""
    file = folder / PROJECT_FILE
    tables = read_toml(file)
    paths = tables.get("paths", {})
    if not isinstance(paths, Mapping):
        raise ParameterError(f"{file}: paths: must be a table of strings, [paths]")
    problems = [f"{file}: {key}: unknown table: only [paths] belongs here" for key in tables if key != "paths"]
    odd = {key: value for key, value in paths.items() if not isinstance(value, str)}
    problems += [f"{file}: paths.{key} = {value!r}: must be a string" for key, value in odd.items()]
    if problems:
        raise ParameterError("\n".join(problems))
    located = {key: relative_to(folder, value, may_be_hub_id=key in HUB_KEYS) for key, value in paths.items() if value}
    return Project(folder=folder, paths=located)


def relative_to(folder: Path, value: str, *, may_be_hub_id: bool) -> str:
    """Returns a path from a file in `folder`, short where it lies below the current one; a hub id stays as it is.

    That is owner/name that is no file there. Only a model may be named by one: the run "runs/star" is a path before
    anything lies in runs/.
    """
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    here = folder / path
    looks_like_hub_id = value.count("/") == 1 and not value.startswith(".") and path.suffix != ".safetensors"
    if may_be_hub_id and looks_like_hub_id and not here.exists() and not here.parent.exists():
        return value
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)
