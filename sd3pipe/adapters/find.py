"""Where an adapter lies: in a run, in one of its checkpoints, as `judge` suggests, or in a file. Free of torch."""

import logging
import re
from pathlib import Path

from sd3pipe.errors import InputError
from sd3pipe.files import nearest_path
from sd3pipe.judgement import JUDGE_FOLDER, read_judgement

log = logging.getLogger(__name__)

ADAPTER_NAME = "adapter.safetensors"
STATE_NAME = "state.json"  # of a checkpoint, says what its files are
_NAMES_OF_OTHERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', peft's
_STEP = re.compile(r"step-(\d+)")


def find_adapter(path: Path) -> Path:
    """Returns the adapter file that a run, a checkpoint, a folder of diffusers or peft, or a file name stands for.

    A run stands for its finished adapter; where there is none, for that of its newest checkpoint, with a warning.
    Raises InputError where there is neither.
    """
    if path.is_file():
        return path
    for name in (ADAPTER_NAME, f"final/{ADAPTER_NAME}", *_NAMES_OF_OTHERS):
        if (path / name).is_file():
            return path / name
    found = checkpoint_adapters(path)
    if found:
        newest = max(found)
        log.warning("%s is not finished: its newest checkpoint is taken, %s", path, found[newest].parent.name)
        return found[newest]
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        meant = f"; name one of its files, such as {path / names[0]}" if names else ""
        raise InputError(
            f"{path}: holds no adapter: no {ADAPTER_NAME}, no final/{ADAPTER_NAME}, no checkpoint of a run{meant}"
        )
    raise InputError(f"{path}: there is no such run, checkpoint or file{nearest_path(path)}")


def suggested_adapter(run: Path) -> tuple[Path, float]:
    """Returns the adapter of a run that its judge.json suggests, and at which strength. Raises InputError for none."""
    run = run.parent if run.name == "final" and not (run / JUDGE_FOLDER).exists() else run
    folder = run / JUDGE_FOLDER
    suggestion = read_judgement(folder).suggestion
    found = checkpoint_adapters(run)
    if suggestion.checkpoint is None:
        raise InputError(f"{folder}: suggests no checkpoint: {suggestion.text}")
    if not isinstance(suggestion.checkpoint, int) or suggestion.checkpoint not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise InputError(
            f"{folder}: suggests {suggestion.checkpoint}, and {run} has the steps {steps}: run `sd3pipe judge` again"
        )
    log.info("%s", suggestion.text)
    strength = 1.0 if suggestion.multiplier is None else suggestion.multiplier
    if strength != 1.0:
        log.info("strength %g is written into the file: load it at 1", strength)
    return found[suggestion.checkpoint], strength


def run_of(adapter: Path) -> Path | None:
    """Returns the run whose result or checkpoint an adapter file is, None for a file elsewhere."""
    folder = adapter.absolute().parent
    if folder.name == "final":
        return folder.parent
    is_checkpoint = _STEP.fullmatch(folder.name) and folder.parent.name == "checkpoints"
    return folder.parent.parent if is_checkpoint else None


def samples_of(run: Path) -> dict[int, list[Path]]:
    """Returns the pictures that a run drew, by step and in the order of its prompts; steps without any are left out."""
    found = {
        int(match[1]): sorted(file for file in folder.glob("*.png") if file.is_file())
        for folder in run.glob("samples/step-*")
        if (match := _STEP.fullmatch(folder.name))
    }
    return {step: files for step, files in sorted(found.items()) if files}


def checkpoint_adapters(run: Path) -> dict[int, Path]:
    """Returns the adapters in a run's checkpoints by step, in order."""
    found = {
        int(match[1]): folder / ADAPTER_NAME
        for folder in run.glob("checkpoints/step-*")
        if (match := _STEP.fullmatch(folder.name)) and (folder / ADAPTER_NAME).is_file()
    }
    return dict(sorted(found.items()))
