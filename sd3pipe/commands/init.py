"""`sd3pipe init`: a project of the user's own, with every value that was chosen for them explained beside it."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from sd3pipe.config import PROJECT_FILE, read_project
from sd3pipe.console import count, say
from sd3pipe.data.image_dirs import listed_folder
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.init import InitParams
from sd3pipe.params.stage_file import render_stage_file
from sd3pipe.project.inputs import ENCODERS, missing_weights
from sd3pipe.project.pictures import PictureFolder, dataset_toml, look_into, prompts_txt
from sd3pipe.project.pipeline import dvc_yaml
from sd3pipe.project.recipes import Recipe, fitting_advice, length_advice, recipe
from sd3pipe.project.writer import DVCIGNORE, gitignore, project_toml, write_project
from sd3pipe.remote import is_address
from sd3pipe.rules.memory import size_bytes
from sd3pipe.shell import no_option, shell_word
from sd3pipe.stages import Paths, stages_of
from sd3pipe.words import Variant

_ENCODER_NAMES = {  # as ComfyUI's and Stability's downloads are called, best first
    "clip_l": ("clip_l.safetensors",),
    "clip_g": ("clip_g.safetensors",),
    "t5xxl": ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
}
_ENCODER_FOLDERS = (".", "text_encoders", "clip", "../text_encoders", "../clip")
_MISREAD = re.compile(r"~|[\w+.-]+:")  # a home, or what DVC takes for the address of a store


def main(params: InitParams) -> None:
    """Writes the project; asks on a terminal for what is missing; overwrites nothing."""
    model = params.model or _ask("Checkpoint file, diffusers folder or hub id", "--model")
    images = params.images or _ask("Folder with the pictures", "--images")
    found = look_into(images)
    pictures = {_as_seen_from(params.folder, folder.path): folder for folder in found}
    sources = []
    if not is_address(images):  # of a pattern, the folder that its files lie in
        sources = [_as_seen_from(params.folder, listed_folder(Path(images)) or Path(images))]
    shapes = _shapes(model) if params.variant is None or params.vram else {}
    variant = params.variant or detect_mmdit(shapes).variant
    paths = _paths(params, model)
    length = length_advice(
        params.goal,
        pictures=sum(folder.pictures for folder in found),
        in_an_epoch=sum(folder.pictures * folder.repeats for folder in found),
        batch=params.train_batch_size,
        for_comfyui=params.loras_dir is not None,
    )
    advice = {**recipe(variant, params.goal, for_comfyui=params.loras_dir is not None), **length}
    if params.vram is not None:
        advice |= fitting_advice(
            shapes,
            vram_bytes=size_bytes(params.vram),
            resolution=params.resolution,
            batch=length["train_batch_size"].value if "train_batch_size" in length else 1,
        )
    texts = {
        PROJECT_FILE: project_toml(paths),
        "dataset.toml": dataset_toml(
            pictures,
            resolution=params.resolution,
            trigger=params.trigger,
            caption_cache="caches/captions" if params.caption else None,
        ),
        "sample_prompts.txt": prompts_txt(params.trigger, params.resolution),
        **_stage_files(params, paths, variant, advice),
        "dvc.yaml": dvc_yaml(paths, sources, folder=params.folder),
        ".gitignore": gitignore(paths["run"], sources),
        ".dvcignore": DVCIGNORE,
    }
    written = write_project(params.folder, texts)
    _tell(params.folder, found, variant, written, length)


def _ask(question: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise ParameterError(f"init: {option} is missing: {question.lower()}")
    return typer.prompt(question)


def _shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    try:
        return find_component("mmdit", model=model).shapes()
    except InputError as error:
        raise InputError(
            f"{error} (for a model that is not here yet, say --for VARIANT and leave out --vram)"
        ) from error


def _paths(params: InitParams, model: str) -> dict[str, str]:
    called = params.trigger or params.folder.resolve().name
    name = params.name or "".join(char if char.isalnum() or char in "-_." else "_" for char in called) or "lora"
    found = _encoders_near(model)
    given: dict[str, str | Path | None] = {
        "model": model,
        "clip_l": params.clip_l or found.get("clip_l"),
        "clip_g": params.clip_g or found.get("clip_g"),
        "t5xxl": params.t5xxl or found.get("t5xxl"),
        "vae": params.vae,
        "tokenizers": params.tokenizers,
        "loras_dir": params.loras_dir,
        "captioner": params.caption,
    }
    located = {key: _as_seen_from(params.folder, value) for key, value in given.items() if value is not None}
    return {
        **located,
        "dataset": "dataset.toml",
        "sample_prompts": "sample_prompts.txt",
        "caches": "caches",
        "run": f"runs/{name}",
        "export": f"exports/{name}.safetensors",
    }


def _encoders_near(model: str) -> dict[str, Path]:
    """Returns text encoder files beside a checkpoint file, or in ComfyUI's folders for them."""
    file = Path(model)
    if not file.is_file():
        return {}
    found: dict[str, Path] = {}
    for encoder, names in _ENCODER_NAMES.items():
        candidates = [file.parent / folder / name for name in names for folder in _ENCODER_FOLDERS]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None:
            found[encoder] = path.resolve()
    return found


def _as_seen_from(folder: Path, value: str | Path) -> str:
    """Returns a path as project.toml should say it: relative if it lies in the project, else absolute."""
    path = Path(value).expanduser()
    if isinstance(value, str) and not path.exists():
        return value  # a hub id
    absolute, here = path.absolute(), folder.absolute()
    relative = str(absolute.relative_to(here)) if absolute.is_relative_to(here) else None
    return str(absolute) if relative is None or _MISREAD.match(relative) else relative


def _stage_files(params: InitParams, paths: Paths, variant: Variant, advice: Recipe) -> dict[str, str]:
    texts = {}
    models = load_stage_models()
    for stage in dict.fromkeys(stage.module for stage in stages_of(paths)):
        model = models[stage]
        mine = {key: item for key, item in advice.items() if key in model.model_fields}
        values: dict[str, Any] = {key: item.value for key, item in mine.items()}
        if stage == "train" and params.trigger:
            values["metadata_trigger_phrase"] = params.trigger
        notes = {key: f"Chosen for {variant}, {params.goal}: {item.source}" for key, item in mine.items()}
        texts[f"stages/{stage}.toml"] = render_stage_file(model, stage.replace("_", "-"), values, notes)
    return texts


def _tell(folder: Path, found: Sequence[PictureFolder], variant: Variant, written: list[str], length: Recipe) -> None:
    for pictures in found:
        without = pictures.pictures - pictures.captions
        counted = f"{count(pictures.pictures, 'picture')}, {pictures.captions} with a caption, {without} without"
        say(f"{pictures.path}: {counted}" + (f", each {pictures.repeats} times" if pictures.repeats > 1 else ""))
    say(f"{folder}: {count(len(written), 'file')} written for {variant}")
    steps = length["max_train_steps"]
    say(f"{steps.value:,} steps: {steps.source[0].lower()}{steps.source[1:]}")
    if (added := length.get("gradient_accumulation_steps")) is not None:
        say(f"gradient_accumulation_steps = {added.value}: {added.source[0].lower()}{added.source[1:]}")
    for key, reason in missing_weights((*ENCODERS, "vae"), read_project(folder).paths).items():
        say(f"not found, so fill in paths.{key} in {folder / PROJECT_FILE}: {reason}")
    go = "" if folder.resolve() == Path.cwd() else f"cd {shell_word(no_option(str(folder)))} && "
    say(f"next: {go}sd3pipe preview (draws what training will see), then sd3pipe run")
