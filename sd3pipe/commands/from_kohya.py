"""`sd3pipe from-kohya`: a project that does what a command or config of sd-scripts does, and what it does otherwise."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3pipe.config import PROJECT_FILE
from sd3pipe.console import count, say
from sd3pipe.data.prompts import load_prompts
from sd3pipe.errors import ParameterError, Sd3pipeError
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import Params
from sd3pipe.params.from_kohya import FromKohyaParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.stage_file import render_stage_file, toml_value
from sd3pipe.params.train import TrainParams
from sd3pipe.project.accepted import accepted, complaints
from sd3pipe.project.inputs import ENCODERS, missing_weights
from sd3pipe.project.kohya import STAGES, Given, Translation, translate
from sd3pipe.project.kohya_dataset import Block, batches_per_epoch, dataset_blocks, dataset_text, source_paths
from sd3pipe.project.kohya_source import read_source
from sd3pipe.project.pipeline import dvc_yaml
from sd3pipe.project.writer import DVCIGNORE, gitignore, project_toml, write_project
from sd3pipe.shell import no_option, shell_word
from sd3pipe.stages import stages_of
from sd3pipe.training.adapter_options import adapter_spec
from sd3pipe.training.key_values import parse_args
from sd3pipe.training.schedules import make_schedule

_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args")  # of which single words may not fit
_STAY = ("adapter_type", "lr_scheduler", "learning_rate", "network_dim")  # where two values do not fit together
_PLACES: Mapping[str, Mapping[str, Any]] = {  # what project.toml will give, and the command line
    "encode_text": {},
    "encode_latents": {"model": "m", "dataset": "d", "out": "o"},
    "train": {"model": "m", "text": "t", "latents": "l", "out": "o", "allow_code": True},
    "export": {"adapter": "a", "out": "o"},
}


def main(params: FromKohyaParams) -> None:
    """Writes project, stage and dataset files; overwrites nothing.

    Before that, all of it is read by what will read it: a value that does not fit is written commented out.
    """
    given = read_source(params.source)
    if params.tokenizers is not None:
        given["tokenizer_cache_dir"] = str(params.tokenizers)
    translation = translate(given, with_defaults=not params.modernize)
    if params.modernize:
        _tell_of_our_defaults(given, translation)
    blocks = dataset_blocks(given, translation)
    _check_blocks_to_swap(translation)
    _check_prompts(translation)
    for stage in STAGES:
        _leave_out_what_does_not_fit(stage, translation)
    _tell_of_steps(dataset_text(blocks), translation)
    texts = _texts(params.out, blocks, translation)
    names = list(texts) if params.dry_run else write_project(params.out, texts)
    _tell(params, translation, blocks, names)


def _tell_of_our_defaults(given: Given, translation: Translation) -> None:
    """Names what the command does not say and sd-scripts would do otherwise."""
    for stage, model in load_stage_models().items():
        for key, theirs in translate(given).values.get(stage, {}).items():
            ours = model.model_fields[key].default
            if key not in translation.values[stage] and ours != theirs:
                translation.changed.append(f"{key} = {ours}: sd3pipe's default, instead of {theirs}")


def _check_blocks_to_swap(translation: Translation) -> None:
    """Compares blocks_to_swap with what the model has, where the model is here."""
    train, model = translation.values["train"], translation.paths.get("model")
    wanted = train.get("blocks_to_swap")
    if not isinstance(wanted, int) or not wanted or not model or not Path(model).exists():
        return
    try:
        depth = detect_mmdit(find_component("mmdit", model=model).shapes()).depth
    except Sd3pipeError as error:
        translation.changed.append(f"{model}: cannot be looked into: {error}")
        return
    if wanted > depth:
        train["blocks_to_swap"] = depth
        translation.changed.append(
            f"blocks_to_swap = {wanted}: the model has {depth} blocks, all of which are streamed"
        )


def _check_prompts(translation: Translation) -> None:
    """Leaves out sample prompts that our reader refuses."""
    path = translation.paths.get("sample_prompts")
    if path is None:
        return
    text = translation.prompts
    problems = complaints(text or "", Path(path).name, lambda file: load_prompts(Path(path) if text is None else file))
    if problems:
        translation.leave_out("project", "sample_prompts", translation.paths.pop("sample_prompts"), "; ".join(problems))


def _leave_out_what_does_not_fit(stage: str, translation: Translation) -> None:
    values = translation.values[stage]
    units = {
        (key, number): item
        for key, value in values.items()
        for number, item in enumerate(value if key in _LISTS and isinstance(value, list) else [value])
    }

    def word(unit: tuple[str, int]) -> str:
        return str(units[unit]).partition("=")[0] if unit[0] in _LISTS else unit[0]

    kept, unfit = accepted(units, lambda kept: _problems(stage, _whole(kept)), word=word, longest=_STAY)
    for unit, reason in unfit.items():
        translation.leave_out(stage, unit[0], units[unit], reason)
    translation.values[stage] = _whole(kept)


def _whole(units: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for (key, _), item in units.items():
        if key in _LISTS:
            values.setdefault(key, []).append(item)
        else:
            values[key] = item
    return values


def _problems(stage: str, values: Mapping[str, Any]) -> list[str]:
    """Returns what the stage itself would say to a file with these values."""
    checked: list[Params] = []

    def read(file: Path) -> None:
        models = load_stage_models()
        checked.append(resolve(models[stage], stage, _PLACES[stage], config=file, stage_models=lambda: models))

    text = "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())
    found = complaints(text, f"{stage}.toml", read)
    return [*found, *(line for options in checked for line in _problems_of_training(options))]


def _problems_of_training(options: Params) -> Iterator[str]:
    """Yields what train would say to its options before it reads anything."""
    if not isinstance(options, TrainParams):
        return
    for check in (
        lambda: adapter_spec(options.adapter, seed=options.seed),
        lambda: make_schedule(options.schedule, options.batches.max_train_steps),
        lambda: parse_args("optimizer_args", options.optimizer.optimizer_args),
    ):
        try:
            check()
        except ParameterError as error:
            yield from str(error).splitlines()


def _tell_of_steps(dataset: str, translation: Translation) -> None:
    """Says where sd-scripts makes more steps of the same epochs."""
    train = translation.values["train"]
    epochs, micro_batches = train.get("max_train_epochs"), train.get("gradient_accumulation_steps", 1)
    if epochs is None or micro_batches == 1:
        return
    batches = batches_per_epoch(dataset, train.get("train_batch_size", 1))
    there = "sd-scripts ends each epoch with a step of what is left"
    if batches is None:
        translation.changed.append(f"gradient_accumulation_steps: {there}; here a step may span two epochs")
        return
    ours, theirs = -(-epochs * batches // micro_batches), epochs * -(-batches // micro_batches)
    if ours != theirs:
        translation.changed.append(
            f"gradient_accumulation_steps: {ours} steps for {theirs} there: {there}, here a step may span two epochs"
        )


def _texts(folder: Path, blocks: list[Block], translation: Translation) -> dict[str, str]:
    paths = {
        **translation.paths,
        "dataset": "dataset.toml",
        "caches": "caches",
        "run": f"runs/{translation.name}",
        "export": f"exports/{translation.name}.safetensors",
    }
    left_out = _left_out_of("project", translation)
    model = {"model": left_out["model"][0][0]} if "model" in left_out else {}
    texts = {
        "dataset.toml": dataset_text(blocks),
        PROJECT_FILE: project_toml(paths, left_out),
        "dvc.yaml": dvc_yaml({**model, **paths}, source_paths(blocks), folder=folder),
    }
    models = load_stage_models()
    for stage in dict.fromkeys(stage.module for stage in stages_of({**model, **paths})):
        texts[f"stages/{stage}.toml"] = render_stage_file(
            models[stage],
            stage.replace("_", "-"),
            translation.values.get(stage, {}),
            left_out=_left_out_of(stage, translation),
        )
    if translation.prompts is not None:
        texts["sample_prompts.txt"] = translation.prompts
    return {**texts, ".gitignore": gitignore(f"runs/{translation.name}", []), ".dvcignore": DVCIGNORE}


def _left_out_of(file: str, translation: Translation) -> dict[str, list[tuple[Any, str]]]:
    return {key: items for (its_file, key), items in translation.left_out.items() if its_file == file}


def _tell(params: FromKohyaParams, translation: Translation, blocks: Sequence[Block], names: list[str]) -> None:
    left_out = [
        f"{PROJECT_FILE if file == 'project' else f'stages/{file}.toml'}: {key} = {value}: {reason}"
        for (file, key), items in translation.left_out.items()
        for value, reason in items
    ]
    left_out += [
        f"dataset.toml: {key} = {value}: {reason}"
        for block in blocks
        for key, (value, reason) in block.left_out.items()
    ]
    for heading, lines in (
        ("Not done here:", translation.lost),
        ("Acts differently:", translation.changed),
        ("Written commented out:", left_out),
        ("Without effect:", list(translation.idle.values()) if params.all else []),
    ):
        if lines:
            say(heading, *(f"  {line}" for line in lines))
    if translation.idle and not params.all:
        say(f"Without effect: {count(len(translation.idle), 'option')} ({', '.join(translation.idle)}); --all says why")
    done = "would be written" if params.dry_run else "written"
    say(f"{params.out}: {count(len(names), 'file')} {done}: {', '.join(names) or 'all were there'}")
    for key, reason in missing_weights((*ENCODERS, "vae"), translation.paths).items():
        say(f"not found, so fill in paths.{key} in {params.out / PROJECT_FILE}: {reason}")
    go = "" if params.out.resolve() == Path.cwd() else f"cd {shell_word(no_option(str(params.out)))} && "
    say(
        "next:",
        f"  {go}sd3pipe preview    # draws what training will see",
        "  sd3pipe run --dry-run    # checks options and files, and says what lies ahead",
        "  sd3pipe run",
    )
