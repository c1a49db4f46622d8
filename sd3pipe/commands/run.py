"""`sd3pipe run`: every stage of a project in order, each in its own process; a stage that is up to date says so.

The stages decide themselves what is left to do: the encode stages by their rows' keys, train by the identity of the
run, export by the content of the adapter. So this program knows the order and the paths, and nothing else.
"""

import os
from pathlib import Path

from sd3pipe.child import run_child
from sd3pipe.config import PROJECT_FILE, Project, find_project, read_project
from sd3pipe.console import say
from sd3pipe.errors import ParameterError
from sd3pipe.params.run import RunParams
from sd3pipe.shell import shell_line
from sd3pipe.stages import REQUIRED_KEYS, command_words, stages_of


def main(params: RunParams) -> None:
    """Runs the wanted stages of the project; stops at the first that fails, with its exit code."""
    project = _project(params.project)
    arguments = stage_arguments(project)
    wanted = params.stages or tuple(arguments)
    missing = [stage for stage in wanted if stage not in arguments]
    if missing:
        raise ParameterError(
            f"{project.file}: paths.sample_prompts is missing, so there is nothing for {missing[0]} to do"
        )
    if params.allow_code:
        arguments["train"].append("--allow-code")
    for stage in arguments:
        if stage in wanted:
            _run_stage(stage, arguments[stage], project, dry_run=params.dry_run)


def stage_arguments(project: Project) -> dict[str, list[str]]:
    """Returns the stages of a project in order, each with its command line behind `sd3pipe`. Raises ParameterError."""
    _require(project, *REQUIRED_KEYS)
    return {stage.name: command_words(stage, project.paths) for stage in stages_of(project.paths)}


def _require(project: Project, *keys: str) -> None:
    missing = [key for key in keys if not project.paths.get(key)]
    if missing:
        raise ParameterError("\n".join(f"{project.file}: paths.{key} is missing" for key in missing))


def _project(folder: Path | None) -> Project:
    if folder:
        read_project(folder)
        os.chdir(folder)  # the stages find their parameter files from where they run
    project = find_project(Path.cwd())
    if project is None:
        raise ParameterError(
            f"there is no {PROJECT_FILE} here or above: `sd3pipe init` writes one, or pass --project DIR"
        )
    return project


def _run_stage(stage: str, arguments: list[str], project: Project, *, dry_run: bool) -> None:
    say(f"$ {shell_line(['sd3pipe', *arguments])}")
    if dry_run:
        return
    run_child(stage, arguments, same_command="sd3pipe run")
