"""Checks a project's stages before the first one runs: every option, and every file that they begin with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3pipe.config import Project
from sd3pipe.errors import InputError, ParameterError, Sd3pipeError
from sd3pipe.models.hub import is_hub_id
from sd3pipe.models.layouts import Component
from sd3pipe.models.sources import find_component
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import Params
from sd3pipe.params.resolve import resolve
from sd3pipe.project.amounts import read_amounts, read_prompts
from sd3pipe.stages import STAGES, Stage, paths_of, place
from sd3pipe.tensors.header import read_header

ENCODERS: tuple[Component, ...] = ("clip_l", "clip_g", "t5xxl")
_COMPONENTS: Mapping[str, tuple[Component, ...]] = {
    "encode-text": ENCODERS, "encode-latents": ("vae",), "train": ("mmdit",),
}  # fmt: skip


def check_stages(project: Project, stages: Sequence[Stage], *, allow_code: bool = False) -> dict[str, Params]:
    """Returns the options of each stage by its name. Raises ParameterError or InputError with a line per problem."""
    options: dict[str, Params] = {}
    problems: list[Sd3pipeError] = []
    for stage in stages:
        try:
            options[stage.name] = stage_options(project, stage, allow_code=allow_code)
        except ParameterError as error:
            problems.append(error)
    checked = [stage for stage in stages if stage.name in options]
    problems += [problem for stage in checked for problem in _problems(project, stage, options[stage.name], stages)]
    if problems:
        lines = dict.fromkeys(line for problem in problems for line in str(problem).splitlines())
        raise min(problems, key=lambda problem: problem.exit_code).__class__("\n".join(lines))
    return options


def stage_options(project: Project, stage: Stage, *, allow_code: bool = False) -> Params:
    """Returns the options with which `run` starts a stage. Raises ParameterError."""
    models = load_stage_models()
    named = [path for path in paths_of(stage, project.paths) if path.option]
    given: dict[str, Any] = {path.option: place(project.paths, path.key) for path in named}
    if allow_code and stage.command == "train":
        given["allow_code"] = True
    return resolve(models[stage.module], stage.command, given, project=project, stage_models=lambda: models)


def _problems(project: Project, stage: Stage, options: Params, wanted: Sequence[Stage]) -> Iterator[Sd3pipeError]:
    made = {other.out.key: other for other in STAGES}
    for path in paths_of(stage, project.paths):
        where = Path((getattr(options, path.option) if path.option else place(project.paths, path.key)) or "")
        if path.role == "data":
            try:
                read_prompts(where) if path.option == "sample_prompts" else read_amounts(where)
            except (InputError, ParameterError) as error:
                yield error
        if path.role == "made" and made[path.key] not in wanted and not where.exists():
            yield InputError(f"{where}: is not there yet: `sd3pipe run {made[path.key].name}` makes it")
    for key, reason in missing_weights(_COMPONENTS.get(stage.command, ()), options.model_dump()).items():
        state = "" if project.paths.get(key) else " is to be filled in"
        yield InputError(f"{project.file}: paths.{key}{state}: {reason}")


def missing_weights(components: Sequence[Component], given: Mapping[str, Any]) -> dict[str, str]:
    """Returns what is not found, by the key of project.toml that would name it, with the reason.

    `given` has paths by such keys. A hub repository is not looked into: that would take the network.
    """
    model = str(given["model"]) if given.get("model") else None
    files = {component: Path(given[component]) for component in components if given.get(component)}
    remote = model is not None and is_hub_id(model) and not Path(model).expanduser().exists()
    if model and not remote and not Path(model).expanduser().exists() and len(files) < len(components):
        return {"model": f"{model}: there is no such file or folder"}
    if model and Path(model).expanduser().is_file() and len(files) < len(components):
        try:
            read_header(Path(model).expanduser())
        except InputError as error:
            return {"model": str(error)}
    found: dict[str, str] = {}
    for component in components:
        if component in files or not remote:
            try:
                find_component(component, model=model, file=files.get(component))
            except InputError as error:
                found["model" if component == "mmdit" else component] = str(error)
    if set(ENCODERS) <= set(components) and not (remote and not given.get("tokenizers")):
        folder = Path(given["tokenizers"]) if given.get("tokenizers") else None
        try:
            find_tokenizers(folder=folder, model=model, files=[files[name] for name in ENCODERS if name in files])
        except InputError as error:
            found["tokenizers"] = str(error)
    return found
