"""One run: its options, inputs and model; and what makes two runs the same, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.amp import GradScaler
from torch.optim import Optimizer

from sd3pipe.adapters.find import find_adapter
from sd3pipe.fingerprint import hash_file
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.sources import ComponentSource
from sd3pipe.params.train import TrainParams
from sd3pipe.training.batches import steps_of_epochs
from sd3pipe.training.objective import Objective
from sd3pipe.training.processes import Processes
from sd3pipe.training.run_folder import RunFolder, Start
from sd3pipe.training.schedules import EXTENDABLE
from sd3pipe.training.trained_weights import TrainedWeights
from sd3pipe.training.training_data import TrainingData
from sd3pipe.words import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """What the options and files amount to, before any weights are read."""

    base: str  # fingerprint of the MMDiT
    precision: Precision
    micro_batches: int  # per step, over all processes
    total_steps: int
    network_weights: Path | None
    base_weights: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run, as far as it is known before its base is loaded."""

    params: TrainParams
    processes: Processes
    data: TrainingData
    source: ComponentSource  # of the base
    inputs: RunInputs
    identity: Mapping[str, object]
    start: Start
    folder: RunFolder

    @property
    def output_name(self) -> str:
        return self.params.output_name or self.params.out.name


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The objective with base and adapter, what keeps the base's blocks, what is trained and what trains it."""

    objective: Objective
    streamer: BlockStreamer
    weights: TrainedWeights
    optimizer: Optimizer
    scaler: GradScaler | None = None


def resolve_inputs(
    params: TrainParams, data: TrainingData, *, base: str, precision: Precision, num_processes: int
) -> RunInputs:
    """Returns the inputs of a run. Raises InputError for an adapter that is not there."""
    batches = params.batches
    micro_batches = batches.gradient_accumulation_steps * num_processes
    total_steps = batches.max_train_steps
    if batches.max_train_epochs is not None:
        total_steps = steps_of_epochs(
            data.train,
            batches.max_train_epochs,
            seed=params.seed,
            batch_size=batches.train_batch_size,
            micro_batches=micro_batches,
        )
    return RunInputs(
        base=base,
        precision=precision,
        micro_batches=micro_batches,
        total_steps=total_steps,
        network_weights=find_adapter(params.network_weights) if params.network_weights else None,
        base_weights=tuple(find_adapter(path) for path in params.base_weights),
    )


def run_identity(params: TrainParams, data: TrainingData, inputs: RunInputs) -> dict[str, object]:
    """Returns the identity. The number of steps belongs to it only where the learning rate depends on it."""
    identity: dict[str, object] = {
        "base": inputs.base,
        **data.identity(),
        "network_weights": _hashes([inputs.network_weights] if inputs.network_weights else []),
        "base_weights": _hashes(inputs.base_weights),
        "micro_batches_per_step": inputs.micro_batches,
        "mixed_precision": inputs.precision,
        **params.with_role("identity"),
    }
    if params.schedule.lr_scheduler not in EXTENDABLE:
        identity["total_steps"] = inputs.total_steps
    return identity


def _hashes(paths: Sequence[Path]) -> list[str]:
    return [hash_file(path) for path in paths]
