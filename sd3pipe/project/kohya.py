"""Translates a run of sd-scripts' sd3_train_network.py, given as a command line or a config file, into a project.

Every value that sd-scripts would use is written out, its own defaults included; whatever acts differently here, or not
at all, is listed with the reason.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3pipe.config import flatten, read_toml
from sd3pipe.errors import ParameterError
from sd3pipe.params.fields import Params, is_foreign_code
from sd3pipe.params.refused import ALREADY_SO, REFUSED
from sd3pipe.params.resolve import nearest
from sd3pipe.project.kohya_options import DATASET_OPTIONS, OTHER_OPTIONS, PATH_OPTIONS, TRAIN_OPTIONS, KohyaOption

SCRIPT = "sd3_train_network.py"
Stages = Mapping[str, type[Params]]


@dataclass(slots=True, kw_only=True)
class Translation:
    """What a run of sd-scripts becomes: paths, values per stage, and what to tell, sorted by how much it matters."""

    name: str = "last"
    paths: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)  # keys for the dataset file's [general]
    dataset_file: Path | None = None
    picture_folders: list[tuple[Path, bool]] = field(default_factory=list)  # train_data_dir, reg_data_dir
    dropped: list[str] = field(default_factory=list)  # changes what is trained: told first
    refused: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)


def read_command(text: str) -> dict[str, Any]:
    """Returns the options of a command line, by name; of a --config_file, too, which the command line beats.

    Raises ParameterError if it is no command of sd3_train_network.py.
    """
    try:
        words = [word for word in shlex.split(text.replace("\\\n", " ").replace("^\n", " ")) if word.strip()]
    except ValueError as error:
        raise ParameterError(f"the command cannot be split into words: {error}") from error
    scripts = [number for number, word in enumerate(words) if Path(word).name.endswith(".py")]
    if scripts and Path(words[scripts[0]]).name != SCRIPT:
        raise ParameterError(f"{words[scripts[0]]}: only commands of {SCRIPT} (SD3 LoRA training) can be translated")
    words = words[scripts[0] + 1 :] if scripts else words
    given: dict[str, Any] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if has_value else []
        elif name is None:
            raise ParameterError(f"{word}: is not an option of {SCRIPT}")
        else:
            given[name].append(word)
    options = {key: _from_words(key, values) for key, values in given.items()}
    if "config_file" not in options:
        return options
    config = options.pop("config_file")
    if not isinstance(config, str):
        raise ParameterError("--config_file: names no file")
    return {**read_config(Path(config if config.endswith(".toml") else f"{config}.toml")), **options}


def read_config(path: Path) -> dict[str, Any]:
    """Returns the options of an sd-scripts config file, whose tables are headings only. Raises ParameterError."""
    return dict(flatten(read_toml(path)))


def translate(given: Mapping[str, Any], stages: Stages) -> Translation:
    """Returns the project that does what sd-scripts would do with the options `given`."""
    result = Translation(name=str(given.get("output_name") or "last"))
    result.values = {stage: {} for stage in stages}
    _warn_of_text_encoder_lora(given, result)
    for key, value in given.items():
        _translate_given(key, value, stages, result)
    for key, option in TRAIN_OPTIONS.items():
        if key not in given and option.default is not None:
            _set(key, option.default, stages, result)
    _fix_meanings(given, result)
    result.dataset |= {
        key: option.default
        for key, option in DATASET_OPTIONS.items()
        if option.default is not None and key not in given
    }
    return result


def _translate_given(key: str, value: Any, stages: Stages, result: Translation) -> None:
    if key in PATH_OPTIONS:
        result.paths[PATH_OPTIONS[key]] = str(value)
    elif key == "dataset_config":
        result.dataset_file = Path(str(value))
    elif key in ("train_data_dir", "reg_data_dir"):
        result.picture_folders.append((Path(str(value)), key == "reg_data_dir"))
    elif key == "output_name":
        pass
    elif key in DATASET_OPTIONS:
        result.dataset[key] = value
    elif key == "network_module" and value != "networks.lora_sd3":
        result.changed.append(f"network_module = {value}: fails for SD3 in sd-scripts; taken as networks.lora_sd3")
    elif key in ALREADY_SO:
        answer = ALREADY_SO[key].answer(value)
        (result.same if answer.accepted else result.refused).append(f"{key} = {value}: {answer.text}")
    elif not _set(key, value, stages, result):
        _refuse(key, value, result)


def _set(key: str, value: Any, stages: Stages, result: Translation) -> bool:
    """Puts a value into the stage that has an option of that name; returns whether there is one."""
    for stage, model in stages.items():
        if key in model.model_fields:
            result.values[stage][key] = value
            return True
    return False


def _refuse(key: str, value: Any, result: Translation) -> None:
    if key in REFUSED:
        result.refused.append(f"{key} = {value}: {REFUSED[key]}")
    elif key in TRAIN_OPTIONS or key in OTHER_OPTIONS:
        result.refused.append(f"{key} = {value}: sd3pipe has no such option")
    else:
        known = (*TRAIN_OPTIONS, *DATASET_OPTIONS, *PATH_OPTIONS, *ALREADY_SO, *REFUSED)
        result.refused.append(f"{key} = {value}: sd-scripts has no such option{nearest(key, known)}")


def _warn_of_text_encoder_lora(given: Mapping[str, Any], result: Translation) -> None:
    if given.get("network_train_unet_only") is not True:
        result.dropped.append(
            "text encoder LoRA: without --network_train_unet_only sd-scripts trains CLIP-L and CLIP-G, too; here text "
            "encoders are not trained, since their outputs are cached. The MMDiT's part is the same"
        )


def _fix_meanings(given: Mapping[str, Any], result: Translation) -> None:
    """Writes out what sd-scripts does without saying, and names the places where the same value acts otherwise."""
    train = result.values["train"]
    train["loss_form"] = "x0"
    result.same.append("loss_form = x0: sd-scripts' loss compares x - sigma v with the latents")
    if train.get("network_alpha") == 0:
        train["network_alpha"] = train.get("network_dim", 4)
    if train.pop("masked_loss", False):
        train["masked_loss"] = "sum"
    if train.get("optimizer_type") == "":
        train["optimizer_type"] = "AdamW"
    if is_foreign_code(train.get("optimizer_type")):
        result.changed.append(
            f"optimizer_type = {train['optimizer_type']}: is imported and run, which a file may not ask for by itself: "
            "pass --allow-code to `sd3pipe run` or `train`"
        )
    if str(train.get("optimizer_type")).lower() == "adafactor":
        train["optimizer_args"] = _adafactor_args(train.get("optimizer_args") or [])
    if given.get("max_train_epochs") is not None:
        train.pop("max_train_steps", None)
    if given.get("blocks_to_swap") is None:
        train["blocks_to_swap"] = 0
    if train.get("loss_type") not in ("huber", "smooth_l1"):
        for key in ("huber_c", "huber_scale", "huber_schedule"):
            train.pop(key, None)
    if given.get("seed") is None:
        result.changed.append(
            "seed: sd-scripts draws one; here it is 42 unless you set one, so that a run can be repeated"
        )
    result.changed += [
        "latents: sd-scripts caches one random draw per picture; here train draws anew from the cached moments",
        "timesteps: sd-scripts rounds them to the compute type (507 values in bfloat16); here they stay float32",
        "resume is exact, and starts by itself when the same command is given again",
    ]


def _adafactor_args(args: list[str]) -> list[str]:
    """Returns the arguments with the ones that sd-scripts sets unless they are given."""
    named = {arg.partition("=")[0].strip() for arg in args}
    return [*args, *(f"{key}=True" for key in ("relative_step", "scale_parameter") if key not in named)]


def _from_words(key: str, words: list[str]) -> Any:
    option = TRAIN_OPTIONS.get(key) or DATASET_OPTIONS.get(key)
    if not words:
        return True
    return [_parsed(option, word) for word in words] if option and option.kind == "list" else _parsed(option, words[0])


def _parsed(option: KohyaOption | None, word: str) -> Any:
    if option is None:
        return True if word.lower() == "true" else False if word.lower() == "false" else word
    try:
        match option.kind:
            case "int":
                return int(word)
            case "float":
                return float(word)
            case "int_or_float":
                return _ratio_or_steps(word)
    except (ValueError, OverflowError) as error:
        raise ParameterError(f"{word}: is not a number, as {SCRIPT} would want here") from error
    return word


def _ratio_or_steps(word: str) -> int | float:
    if word.endswith("%"):
        return float(word[:-1]) / 100
    number = float(word)
    return int(number) if number >= 1 else number
