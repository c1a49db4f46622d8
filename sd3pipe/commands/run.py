"""`sd3pipe run`: every stage of a project in order, each in its own process; a stage that is up to date says so.

The stages decide themselves what is left to do: the encode stages by their rows' keys, train by the identity of the
run, export by the content of the adapter. So this program only checks beforehand what would stop them later.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3pipe.child import run_child
from sd3pipe.config import PROJECT_FILE, Project, find_project, read_project
from sd3pipe.console import readable_bytes, say
from sd3pipe.errors import ParameterError
from sd3pipe.files import free_bytes
from sd3pipe.params.run import RunParams
from sd3pipe.project.ahead import ahead
from sd3pipe.project.inputs import check_stages
from sd3pipe.shell import no_option, shell_line
from sd3pipe.stages import REQUIRED_KEYS, STAGES, STAGES_BY_NAME, Stage, command_words, place, stages_of

log = logging.getLogger(__name__)

_WIDTH = 30  # of a command, so that what is said about it stands in a column


def main(params: RunParams) -> None:
    """Runs the wanted stages of the project; stops at the first that fails, with its exit code.

    All options and inputs of all of them are checked before the first one begins.
    """
    project = _project(params.project)
    there = {stage.name: stage for stage in stages_of(project.paths)}
    missing = [name for name in params.stages if name not in there]
    if missing:
        its = STAGES_BY_NAME[missing[0]]
        keys = [*its.asks_for, *(path.key for path in its.paths if path.role == "data"), its.out.key]
        key = next(key for key in keys if key.partition("/")[0] not in project.paths)
        raise ParameterError(f"{project.file}: paths.{key} is missing, so there is nothing for {its.name} to do")
    stages = [stage for name, stage in there.items() if not params.stages or name in params.stages]
    _tell(project, stages, params)
    for stage in () if params.dry_run else stages:
        say(_shown(stage, project, params))
        words = [*command_words(stage, project.paths), *_code_words(stage, params)]
        run_child(stage.name, words, same_command="sd3pipe run")


def _tell(project: Project, stages: Sequence[Stage], params: RunParams) -> None:
    """Prints each stage's command with what lies ahead of it, and says whether the disk has room for all."""
    with _silent():  # the stages say themselves what is odd about their options
        options = check_stages(project, stages, allow_code=params.allow_code)
        found = {stage: ahead(options[stage.name], project) for stage in stages}
    needed = sum(its.disk_bytes for its in found.values())
    free = free_bytes(Path(project.paths["caches"]))
    if needed:
        level = logging.WARNING if needed > free else logging.INFO
        log.log(level, "disk: at most %s to write, %s free", readable_bytes(needed), readable_bytes(free))
    for its in found.values():
        if its.advice:
            log.info("disk: %s", its.advice)
    for stage, its in found.items():
        shown = _shown(stage, project, params)
        say(f"{shown:<{_WIDTH}} # {', '.join(its.facts)}" if its.facts else shown)


def _shown(stage: Stage, project: Project, params: RunParams) -> str:
    """Returns a stage's command with what it does not take from project.toml by itself."""
    others = {path for other in STAGES if other != stage and other.command == stage.command for path in other.paths}
    words = ["sd3pipe", stage.command]
    for path in stage.paths if others else ():
        if path.role == "data" and path not in others:
            words += [f"--{path.option.replace('_', '-')}", no_option(place(project.paths, path.key))]
    return f"$ {shell_line([*words, *_code_words(stage, params)])}"


def _code_words(stage: Stage, params: RunParams) -> list[str]:
    return ["--allow-code"] if params.allow_code and stage.command == "train" else []


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    package = logging.getLogger("sd3pipe")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _project(folder: Path | None) -> Project:
    """Returns the project at hand. Raises ParameterError where there is none, or it lacks what every project has."""
    if folder:
        read_project(folder)
        os.chdir(folder)  # the stages find their parameter files from where they run
    project = find_project(Path.cwd())
    if project is None:
        raise ParameterError(
            f"there is no {PROJECT_FILE} here or above: `sd3pipe init` writes one, or pass --project DIR"
        )
    missing = [f"{project.file}: paths.{key} is missing" for key in REQUIRED_KEYS if not project.paths.get(key)]
    if missing:
        raise ParameterError("\n".join(missing))
    return project
