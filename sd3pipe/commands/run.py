"""`sd3pipe run`: every stage of a project in order, each in its own process; a stage that is up to date says so.

The stages decide themselves what is left to do: the encode stages by their rows' keys, train by the identity of the
run, export by the content of the adapter. So this program knows the order and the paths, and nothing else.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from sd3pipe.child import ChildFailed, run_child
from sd3pipe.config import PROJECT_FILE, Project, find_project, read_project
from sd3pipe.errors import ExitCode, ParameterError
from sd3pipe.params.run import RunParams

Paths = Mapping[str, str]


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
    for stage in arguments:
        if stage in wanted:
            _run_stage(stage, arguments[stage], project, dry_run=params.dry_run)


def stage_arguments(project: Project) -> dict[str, list[str]]:
    """Returns the stages of a project in order, each with its command line behind `sd3pipe`. Raises ParameterError."""
    _require(project, "model", "dataset", "caches", "run", "export")
    paths = project.paths
    stages = {"encode-text": _encode_text(paths, "--dataset", paths["dataset"], "text")}
    if "sample_prompts" in paths:
        stages["encode-prompts"] = _encode_text(paths, "--sample-prompts", paths["sample_prompts"], "prompts")
    stages["encode-latents"] = [
        "encode-latents", *_options(paths, "model", "vae", "dataset"), "--out", f"{paths['caches']}/latents"
    ]  # fmt: skip
    stages["train"] = _train(paths)
    stages["export"] = ["export", "--adapter", paths["run"], *_options(paths, "model"), "--out", paths["export"]]
    return stages


def _encode_text(paths: Paths, source: str, file: str, cache: str) -> list[str]:
    encoders = _options(paths, "model", "clip_l", "clip_g", "t5xxl", "tokenizers")
    return ["encode-text", *encoders, source, file, "--out", f"{paths['caches']}/{cache}"]


def _train(paths: Paths) -> list[str]:
    caches = ["--text", f"{paths['caches']}/text", "--latents", f"{paths['caches']}/latents"]
    if "sample_prompts" in paths:
        caches += ["--prompts", f"{paths['caches']}/prompts"]
    return ["train", *_options(paths, "model", "vae"), *caches, "--out", paths["run"], *_options(paths, "loras_dir")]


def _options(paths: Paths, *keys: str) -> list[str]:
    return [word for key in keys if key in paths for word in (f"--{key.replace('_', '-')}", paths[key])]


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
    shown = shlex.join(["sd3pipe", *arguments])
    print(f"$ {shown}", flush=True)
    if dry_run:
        return
    code = run_child(arguments)
    if code != ExitCode.DONE:
        raise ChildFailed(stage, code, "sd3pipe run")
