"""Writes checkpoints, copies adapters to the folder where programs look for them, goes back to a checkpoint."""

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sd3pipe.adapters.files import save_adapter
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_file, followed, storage_errors, write_json
from sd3pipe.rules.occasions import SavingRules
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
from sd3pipe.training.feed import Step
from sd3pipe.training.optimizers import export_state, import_state
from sd3pipe.training.processes import Processes
from sd3pipe.training.progressed import Progressed
from sd3pipe.training.records import forget_after
from sd3pipe.training.run_folder import RunFolder
from sd3pipe.training.state_file import read_state, write_state
from sd3pipe.training.trained_model import TrainedModel
from sd3pipe.words import SavePrecision, StoredFormat

log = logging.getLogger(__name__)

_STORED_FORMATS: Mapping[SavePrecision | None, StoredFormat] = {
    None: "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"
}  # fmt: skip


class Saver:
    """Keeps one run's checkpoints. All processes call it alike; the main one writes."""

    def __init__(
        self,
        *,
        run: RunFolder,
        processes: Processes,
        model: TrainedModel,
        state: Mapping[str, object],
        metadata: Callable[[Progressed], Mapping[str, str]],
        rules: SavingRules,
        names: Sequence[str],
        output_name: str,
        loras_dir: Path | None = None,
        newest: Checkpoint | None = None,
    ) -> None:
        self._run, self._processes = run, processes
        self._network, self._weights = model.objective.network, model.weights
        self._optimizer, self._scaler = model.optimizer, model.scaler
        self._state, self._metadata = state, metadata
        self._rules, self._names = rules, names
        self._loras_dir, self._output_name = loras_dir, output_name
        self._newest = newest.path if newest else None
        is_ours = newest is not None and run.path.resolve() in newest.path.resolve().parents
        self._newest_step = newest.step if newest and is_ours else None

    @property
    def can_roll_back(self) -> bool:
        return self._newest is not None

    @property
    def newest_adapter(self) -> Path | None:
        """The adapter file of the newest checkpoint, None before the first."""
        return self._newest / ADAPTER_FILE if self._newest is not None else None

    def picture_names(self, step: Step) -> list[str]:
        """Returns the names of this process's pictures in a step."""
        numbers = [int(number) for batch in step.batches for number in batch.plan.pictures]
        return [self._names[number] for number in numbers]

    def save(self, progressed: Progressed) -> None:
        """Writes a checkpoint of this step, unless there is one, and lets older ones go."""
        if self._newest_step == progressed.step:
            return
        path = self._write(progressed) if self._processes.is_main else None
        self._newest, self._newest_step = self._processes.same(path), progressed.step

    def note(self, progressed: Progressed) -> None:
        """Writes how far the run is into the checkpoint of this very step, if there is one: its weights stay as is."""
        if self._processes.is_main and self._newest is not None and self._newest_step == progressed.step:
            state = self._newest / STATE_FILE
            write_state(state, {**read_state(state), **progressed.to_state()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts weights, optimizer and the fp16 loss scale back to what they were."""
        tensors = checkpoint.tensors()
        self._weights.restore(tensors)
        state = {name: tensor for name, tensor in tensors.items() if name.startswith(("state/", "group/"))}
        import_state(self._optimizer, self._weights.optimized, state, checkpoint.state["optimizer"])
        if self._scaler is not None:
            if "loss_scale" not in checkpoint.state:
                raise InputError(f"{checkpoint.path} was not trained in fp16: it has no loss scale")
            self._scaler.load_state_dict(dict(checkpoint.state["loss_scale"]))

    def roll_back(self, progressed: Progressed) -> None:
        """Goes back to the newest checkpoint: weights, optimizer, progress, records."""
        assert self._newest is not None
        checkpoint = read_checkpoint(self._newest)
        self.restore(checkpoint)
        progressed.become(Progressed.from_state(checkpoint.state))
        if self._processes.is_main:
            forget_after(self._run.path, checkpoint.step)

    def finish(self, inputs: Mapping[str, object]) -> None:
        """Makes final/ from the newest checkpoint: the adapter, and what it was made from."""
        assert self._newest is not None
        if not self._processes.is_main:
            return
        if self._loras_dir is not None:
            copy_file(self._newest / ADAPTER_FILE, followed(self._loras_dir / f"{self._output_name}.safetensors"))
        final = self._run.path / FINAL_FOLDER
        copy_file(self._newest / ADAPTER_FILE, final / ADAPTER_FILE)
        write_json(final / INPUTS_FILE, inputs)  # comes last: it says that the run is finished

    def _write(self, progressed: Progressed) -> Path:
        """Writes a checkpoint, with the first of which a new run takes the place of an older one."""
        tensors, values = export_state(self._optimizer, self._weights.optimized)
        numbers: dict[str, object] = {**progressed.to_state(), "optimizer": values}
        if self._scaler is not None:
            numbers["loss_scale"] = self._scaler.state_dict()
        checkpoint = write_checkpoint(
            self._run.path,
            step=progressed.step,
            write_adapter=functools.partial(self._write_adapter, progressed),
            tensors={**self._weights.export(), **tensors},
            state={**self._state, **numbers},
        )
        if not self._run.is_in_place:
            self._run.settle()
            checkpoint = replace(checkpoint, path=self._run.path / CHECKPOINTS_FOLDER / checkpoint.path.name)
        if self._loras_dir is not None:
            name = loras_file(self._output_name, progressed.step)
            copy_file(checkpoint.adapter, followed(self._loras_dir / name))
        best = [progressed.best_step] if progressed.best_step is not None else []
        prune(self._run.path, checkpoint, self._rules, keep_steps=best)
        return checkpoint.path

    def _write_adapter(self, progressed: Progressed, path: Path) -> None:
        dtype, metadata = _STORED_FORMATS[self._rules.save_precision], self._metadata(progressed)
        with self._weights.delivered(self._optimizer):
            save_adapter(path, self._network.deltas(), dtype=dtype, metadata=metadata)


def loras_file(output_name: str, step: int) -> str:
    """Returns the name of a step's adapter in the folder of another program."""
    return f"{output_name}-step{step:08d}.safetensors"


def copy_file(source: Path, target: Path) -> None:
    """Replaces `target` by a copy of `source` atomically. Raises StorageError."""
    with storage_errors(target), open(source, "rb") as original, atomic_file(target) as copy:
        shutil.copyfileobj(original, copy)
