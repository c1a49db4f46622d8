"""Checkpoints: a folder of safetensors and one JSON file that appears whole or not at all, and is checked when read."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sd3pipe.adapters.find import ADAPTER_NAME as ADAPTER_FILE
from sd3pipe.adapters.find import STATE_NAME as STATE_FILE
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_folder, remove_folder, storage_errors, sync_file, write_json
from sd3pipe.fingerprint import hash_file
from sd3pipe.rules.occasions import SavingRules
from sd3pipe.tensors.reader import read_file
from sd3pipe.tensors.writer import in_file_order, write_tensors
from sd3pipe.training.state_file import State, read_state, write_state

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
FINAL_FOLDER = "final"
INPUTS_FILE = "inputs.json"

_KEPT_STATES = 2  # of the optimizer, where no option says otherwise
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are the ones its state.json names."""

    path: Path
    step: int
    state: State

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_FILE

    @property
    def can_resume(self) -> bool:
        """Whether the optimizer's state has not been deleted to save space."""
        return OPTIMIZER_FILE in self.state["files"]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors and the optimizer's, as they were saved. Raises InputError."""
        return read_file(self.path / OPTIMIZER_FILE)


def step_name(step: int) -> str:
    """Returns the folder name of a step's checkpoint or samples; it sorts by step."""
    return f"step-{step:08d}"


def named_step(path: Path) -> int:
    """Returns the step that such a folder is named after, -1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def write_checkpoint(
    run: Path,
    *,
    step: int,
    write_adapter: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, object],
) -> Checkpoint:
    """Writes a step's checkpoint under a temporary name, then renames it; replaces one of the same step.

    What `write_adapter` writes has to be on the disk when it returns.
    """
    final = run / CHECKPOINTS_FOLDER / step_name(step)
    with atomic_folder(final) as temporary:
        write_adapter(temporary / ADAPTER_FILE)
        with open(temporary / OPTIMIZER_FILE, "xb") as handle:
            write_tensors(handle, in_file_order(tensors), {})
            sync_file(handle)
        paths = {name: temporary / name for name in (ADAPTER_FILE, OPTIMIZER_FILE)}
        files = {name: {"bytes": path.stat().st_size, "blake3": hash_file(path)} for name, path in paths.items()}
        content = write_state(temporary / STATE_FILE, {**state, "step": step, "files": files})
        if final.exists():
            remove_folder(final)
    return Checkpoint(path=final, step=step, state=content)


def read_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint in a folder after checking its files' bytes. Raises InputError that says what is wrong."""
    state = read_state(path / STATE_FILE)
    if named_step(path) not in (-1, state["step"]):
        raise InputError(f"{path} is no whole checkpoint: its {STATE_FILE} is that of step {state['step']}")
    try:
        for name, identity in state["files"].items():
            if (path / name).stat().st_size != identity["bytes"] or hash_file(path / name) != identity["blake3"]:
                raise InputError(f"{path} is torn: {name} is not the file that {STATE_FILE} describes")
    except OSError as error:
        raise InputError(f"{path} is no whole checkpoint: {error.filename}: {error.strerror}") from error
    return Checkpoint(path=path, step=state["step"], state=state)


def checkpoint_paths(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, the oldest first, whole or not."""
    return sorted((path for path in run.glob(f"{CHECKPOINTS_FOLDER}/*") if named_step(path) >= 0), key=named_step)


def newest_checkpoint(run: Path, *, up_to: int | None = None) -> Checkpoint | None:
    """Returns the newest whole checkpoint that a run can go on from; torn ones are named in a warning.

    Raises InputError for one that may not be read.
    """
    for path in reversed(checkpoint_paths(run)):
        if up_to is not None and named_step(path) > up_to:
            continue
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            if isinstance(error.__cause__, PermissionError):
                raise  # it may be whole, and a run is not begun anew for that
            log.warning("%s; going back to the checkpoint before it", error)
            continue
        if checkpoint.can_resume:
            return checkpoint
    return None


def set_aside_later(run: Path, step: int) -> None:
    """Renames checkpoints and samples after `step` to *.superseded: a run that goes on from `step` makes them anew."""
    for path in [*checkpoint_paths(run), *run.glob("samples/step-*")]:
        if named_step(path) > step:
            target = path.with_name(f"{path.name}.superseded")
            if target.exists():
                remove_folder(target)
            with storage_errors(path):
                path.rename(target)
            log.info("%s: renamed to %s", path, target.name)


def mark_best(run: Path, step: int | None, loss: float | None) -> None:
    """Names the step of the lowest validation loss in best.json, which is there only where such a step is known."""
    path = run / CHECKPOINTS_FOLDER / "best.json"
    if step is not None:
        write_json(path, {"step": step, "loss": loss})
    else:
        with storage_errors(path):
            path.unlink(missing_ok=True)


def prune(run: Path, newest: Checkpoint, rules: SavingRules, *, keep_steps: Sequence[int] = ()) -> None:
    """Deletes what `rules` let go of, but never `newest`, which is whole, nor the adapters of `keep_steps`."""
    older = [path for path in checkpoint_paths(run) if path != newest.path]
    for age, path in enumerate(reversed(older), start=1):
        try:
            state = read_state(path / STATE_FILE)
        except InputError:
            continue  # a torn checkpoint is left for the user to look at
        keeps_adapter = _is_recent(state, newest.state, rules.save_last_n_steps, rules.save_last_n_epochs)
        steps, epochs = rules.save_last_n_steps_state, rules.save_last_n_epochs_state
        keeps_optimizer = _is_recent(state, newest.state, steps, None if steps is not None else epochs)
        if steps is None and epochs is None:
            keeps_optimizer = age < _KEPT_STATES
        if not keeps_adapter and state["step"] not in keep_steps:
            remove_folder(path)
        elif not keeps_optimizer:
            # the JSON goes first, so that a crash in between leaves a whole checkpoint
            if OPTIMIZER_FILE in state["files"]:
                del state["files"][OPTIMIZER_FILE]
                write_state(path / STATE_FILE, state)
            with storage_errors(path):
                (path / OPTIMIZER_FILE).unlink(missing_ok=True)


def _is_recent(state: State, newest: State, steps: int | None, epochs: int | None) -> bool:
    """Returns whether a state is at most so many steps older than the newest, and fewer epochs."""
    in_steps = steps is None or state["step"] >= newest["step"] - steps
    return in_steps and (epochs is None or state["position"][0] > newest["position"][0] - epochs)
