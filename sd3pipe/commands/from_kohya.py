"""`sd3pipe from-kohya`: a project that does what a command or config of sd-scripts does, and what it does otherwise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3pipe.config import PROJECT_FILE
from sd3pipe.console import count, say
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import option_extra
from sd3pipe.params.from_kohya import FromKohyaParams
from sd3pipe.params.stage_file import render_stage_file
from sd3pipe.project.ignored import DVCIGNORE, gitignore
from sd3pipe.project.kohya import SCRIPT, Translation, read_command, read_config, translate
from sd3pipe.project.kohya_dataset import dataset_text, read_dataset, source_paths
from sd3pipe.project.pipeline import dvc_yaml
from sd3pipe.project.writer import project_toml, write_project

_HEADINGS = {
    "dropped": "Not trained any more:",
    "refused": "Refused:",
    "changed": "Acts differently:",
    "same": "The same:",
}


def main(params: FromKohyaParams) -> None:
    """Writes project, stage and dataset files; overwrites nothing."""
    given = _read(params.source)
    translation = translate(given, load_stage_models())
    _check_blocks(translation)
    if params.modernize:
        _modernize(given, translation)
    tables = read_dataset(translation)
    texts = _texts(params.out, tables, translation)
    names = list(texts) if params.dry_run else write_project(params.out, texts)
    _tell(params, translation, names)


def _read(source: tuple[str, ...]) -> dict[str, Any]:
    if len(source) == 1 and source[0].endswith(".toml") and SCRIPT not in source[0]:
        return read_config(Path(source[0]))
    return read_command(" ".join(source))


def _check_blocks(translation: Translation) -> None:
    """Compares blocks_to_swap with what the model has, where the model is here."""
    wanted = translation.values["train"].get("blocks_to_swap") or 0
    model = translation.paths.get("model")
    if not wanted or not model or not Path(model).exists():
        return
    depth = detect_mmdit(find_component("mmdit", model=model).shapes()).depth
    if wanted > depth:
        translation.values["train"]["blocks_to_swap"] = depth
        translation.changed.append(
            f"blocks_to_swap = {wanted}: the model has {depth} blocks, all of which are streamed"
        )


def _modernize(given: dict[str, Any], translation: Translation) -> None:
    """Leaves to our own defaults what the command does not say."""
    for stage, model in load_stage_models().items():
        for key in list(translation.values[stage]):
            if key not in given:
                ours, theirs = model.model_fields[key].default, translation.values[stage].pop(key)
                if ours != theirs:
                    translation.changed.append(f"{key} = {ours}: sd3pipe's default, instead of {theirs}")
    translation.same = [line for line in translation.same if not line.startswith("loss_form")]


def _texts(folder: Path, tables: Mapping[str, Any], translation: Translation) -> dict[str, str]:
    dataset = dataset_text(tables, translation)
    texts = {"dataset.toml": dataset, **_project_files(folder, translation, source_paths(tables))}
    for stage, model in load_stage_models().items():
        values = {
            key: value
            for key, value in translation.values[stage].items()
            if option_extra(model.model_fields[key])["role"] != "path"
        }
        texts[f"stages/{stage}.toml"] = render_stage_file(model, stage.replace("_", "-"), values)
    return {**texts, ".gitignore": gitignore(f"runs/{translation.name}", []), ".dvcignore": DVCIGNORE}


def _project_files(folder: Path, translation: Translation, sources: Sequence[str]) -> dict[str, str]:
    """Returns the files that say where things are."""
    paths = {key: _absolute(value) for key, value in translation.paths.items()} | {
        "dataset": "dataset.toml",
        "caches": "caches",
        "run": f"runs/{translation.name}",
        "export": f"exports/{translation.name}.safetensors",
    }
    return {PROJECT_FILE: project_toml(paths), "dvc.yaml": dvc_yaml(paths, sources, folder=folder)}


def _absolute(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def _tell(params: FromKohyaParams, translation: Translation, names: list[str]) -> None:
    for kind, heading in _HEADINGS.items():
        lines = getattr(translation, kind)
        if lines:
            say(heading, *(f"  {line}" for line in lines))
    done = "would be written" if params.dry_run else "written"
    listed = f": {', '.join(names)}" if names else ", since all were there"
    say(f"{params.out}: {count(len(names), 'file')} {done}{listed}")
