"""Writes checkpoints, copies adapters to the folder where programs look for them, goes back to a checkpoint."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from sd3pipe.adapters.files import save_adapter
from sd3pipe.documents import checked
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_file, followed, storage_errors, write_json
from sd3pipe.params.fields import is_foreign_code
from sd3pipe.rules.optimisation import OptimizerRules
from sd3pipe.training.checkpoints import (
    ADAPTER_FILE,
    CHECKPOINTS_FOLDER,
    FINAL_FOLDER,
    INPUTS_FILE,
    STATE_FILE,
    Checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from sd3pipe.training.description import adapter_metadata
from sd3pipe.training.key_values import parse_args
from sd3pipe.training.optimizers import export_state, import_state
from sd3pipe.training.records import forget_after
from sd3pipe.training.run import Run, TrainedModel
from sd3pipe.training.state_file import Progressed, read_state, write_state
from sd3pipe.words import SavePrecision, StoredFormat

_OPTIMIZER = TypeAdapter(OptimizerRules)
_STORED_FORMATS: Mapping[SavePrecision | None, StoredFormat] = {
    None: "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"
}  # fmt: skip


class Saver:
    """Keeps one run's checkpoints. All processes call it alike; the main one writes."""

    def __init__(self, run: Run, model: TrainedModel, warmup_steps: int) -> None:
        self._run, self._model, self._folder = run, model, run.folder
        self._is_main, self._loras_dir = run.processes.is_main, run.params.loras_dir
        self._state = run.start.state(run.identity, warmup_steps)
        newest = run.start.checkpoint
        self._newest = newest.path if newest else None
        is_ours = newest is not None and run.folder.path.resolve() in newest.path.resolve().parents
        self._newest_step = newest.step if newest and is_ours else None

    @property
    def can_roll_back(self) -> bool:
        return self._newest is not None

    @property
    def newest_adapter(self) -> Path | None:
        """The adapter file of the newest checkpoint, None before the first."""
        return self._newest / ADAPTER_FILE if self._newest is not None else None

    def save(self, progressed: Progressed) -> None:
        """Writes a checkpoint of this step, unless there is one, and lets older ones go."""
        if self._newest_step == progressed.step:
            return
        path = self._write(progressed).path if self._is_main else None
        self._newest, self._newest_step = self._run.processes.same(path), progressed.step

    def note(self, progressed: Progressed) -> None:
        """Writes how far the run is into the checkpoint of this very step, if there is one: its weights stay as is."""
        if self._is_main and self._newest is not None and self._newest_step == progressed.step:
            state = self._newest / STATE_FILE
            write_state(state, {**read_state(state), **progressed.to_state()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts weights, optimizer and the fp16 loss scale back to what they were."""
        weights, scaler = self._model.weights, self._model.scaler
        tensors = checkpoint.tensors()
        weights.restore(tensors)
        state = {name: tensor for name, tensor in tensors.items() if name.startswith(("state/", "group/"))}
        values, made_by = checkpoint.state["optimizer"], self._other_optimizer(checkpoint)
        import_state(self._model.optimizer, weights.optimized, state, values, made_by=made_by)
        if scaler is not None:
            if "loss_scale" not in checkpoint.state:
                raise InputError(f"{checkpoint.path} was not trained in fp16: it has no loss scale")
            scaler.load_state_dict(dict(checkpoint.state["loss_scale"]))

    def roll_back(self) -> Progressed:
        """Goes back to the newest checkpoint: weights, optimizer, records; returns how far the run was then."""
        assert self._newest is not None
        checkpoint = read_checkpoint(self._newest)
        self.restore(checkpoint)
        if self._is_main:
            forget_after(self._folder.path, checkpoint.step)
        return Progressed.from_state(checkpoint.state)

    def finish(self) -> None:
        """Makes final/ from the newest checkpoint: the adapter, and what it was made from."""
        assert self._newest is not None
        if not self._is_main:
            return
        if self._loras_dir is not None:
            copy_file(self._newest / ADAPTER_FILE, followed(self._loras_dir / f"{self._run.output_name}.safetensors"))
        final = self._folder.path / FINAL_FOLDER
        copy_file(self._newest / ADAPTER_FILE, final / ADAPTER_FILE)
        made_from = {"identity": self._run.identity, "steps": self._run.inputs.total_steps}
        write_json(final / INPUTS_FILE, made_from)  # comes last: it says that the run is finished

    def _other_optimizer(self, checkpoint: Checkpoint) -> tuple[str, Mapping[str, object]] | None:
        """Returns type and arguments of the optimizer that made a checkpoint, None where they are this run's."""
        said = {key: value for key, value in checkpoint.state["identity"].items() if key.startswith("optimizer_")}
        made_by, own = checked(said, _OPTIMIZER, str(checkpoint.path)), self._run.params.optimizer
        name, args = made_by.optimizer_type, made_by.optimizer_args
        if (name, args) == (own.optimizer_type, own.optimizer_args):
            return None
        if name != own.optimizer_type and is_foreign_code(name):  # which a file cannot have us import
            raise InputError(f"no other optimizer_type takes over the state of a {name}")
        return name, parse_args("optimizer_args", args)

    def _write(self, progressed: Progressed) -> Checkpoint:
        """Writes a checkpoint, with the first of which a new run takes the place of an older one."""
        model, rules = self._model, self._run.params.saving

        def write_adapter(path: Path) -> None:
            metadata = adapter_metadata(self._run, model, progressed)
            with model.weights.delivered(model.optimizer):
                deltas = model.objective.network.deltas()
                save_adapter(path, deltas, dtype=_STORED_FORMATS[rules.save_precision], metadata=metadata)

        tensors, values = export_state(model.optimizer, model.weights.optimized)
        numbers: dict[str, object] = {**progressed.to_state(), "optimizer": values}
        if model.scaler is not None:
            numbers["loss_scale"] = model.scaler.state_dict()
        checkpoint = write_checkpoint(
            self._folder.path,
            step=progressed.step,
            write_adapter=write_adapter,
            tensors={**model.weights.export(), **tensors},
            state={**self._state, **numbers},
        )
        if not self._folder.is_in_place:
            self._folder.settle()
            checkpoint = replace(checkpoint, path=self._folder.path / CHECKPOINTS_FOLDER / checkpoint.path.name)
        if self._loras_dir is not None:
            name = loras_file(self._run.output_name, progressed.step)
            copy_file(checkpoint.adapter, followed(self._loras_dir / name))
        best = [progressed.best_step] if progressed.best_step is not None else []
        prune(self._folder.path, checkpoint, rules, keep_steps=best)
        return checkpoint


def loras_file(output_name: str, step: int) -> str:
    """Returns the name of a step's adapter in the folder of another program."""
    return f"{output_name}-step{step:08d}.safetensors"


def copy_file(source: Path, target: Path) -> None:
    """Replaces `target` by a copy of `source` atomically. Raises StorageError."""
    with storage_errors(target), open(source, "rb") as original, atomic_file(target) as copy:
        shutil.copyfileobj(original, copy)
