"""What makes two runs the same: everything that the trained weights are a function of, by name."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3pipe.adapters.find import find_adapter
from sd3pipe.diffusion.precision import Precision
from sd3pipe.errors import ParameterError
from sd3pipe.fingerprint import hash_file
from sd3pipe.params.train import TrainParams
from sd3pipe.training.batches import steps_of_epochs
from sd3pipe.training.schedules import EXTENDABLE, Schedule, parse_pieces, resolve_steps
from sd3pipe.training.training_data import TrainingData


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """What the options and files amount to, before any weights are read."""

    base: str  # fingerprint of the MMDiT
    precision: Precision
    micro_batches: int  # per step, over all processes
    total_steps: int
    network_weights: Path | None
    base_weights: tuple[Path, ...]


def resolve_inputs(
    params: TrainParams, data: TrainingData, *, base: str, precision: Precision, num_processes: int
) -> RunInputs:
    """Returns the inputs of a run. Raises InputError for an adapter that is not there."""
    micro_batches = params.gradient_accumulation_steps * num_processes
    total_steps = params.max_train_steps
    if params.max_train_epochs is not None:
        total_steps = steps_of_epochs(
            data.train,
            params.max_train_epochs,
            seed=params.seed,
            batch_size=params.train_batch_size,
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


def run_identity(params: TrainParams, data: TrainingData, inputs: RunInputs) -> dict[str, Any]:
    """Returns the identity. The number of steps belongs to it only where the learning rate depends on it."""
    identity: dict[str, Any] = {
        "base": inputs.base,
        **data.identity(),
        "network_weights": _hashes([inputs.network_weights] if inputs.network_weights else []),
        "base_weights": _hashes(inputs.base_weights),
        "micro_batches_per_step": inputs.micro_batches,
        "mixed_precision": inputs.precision,
        **params.with_role("identity"),
    }
    if params.lr_scheduler not in EXTENDABLE:
        identity["total_steps"] = inputs.total_steps
    return identity


def make_schedule(params: TrainParams, total_steps: int) -> Schedule:
    """Returns the learning rate's course. Raises ParameterError where its options do not fit together."""
    warmup = 0 if params.lr_scheduler == "constant" else resolve_steps(params.lr_warmup_steps, total_steps)
    rules = {key: value for key, _, value in (arg.partition("=") for arg in params.lr_scheduler_args)}
    unknown = set(rules) - {"step_rules"}
    if unknown or (bool(rules) != (params.lr_scheduler == "piecewise_constant")):
        raise ParameterError(
            "lr_scheduler_args: step_rules=... belongs to piecewise_constant, which needs it; there are no others"
        )
    if params.lr_scheduler == "warmup_stable_decay" and not params.lr_decay_steps:
        raise ParameterError("lr_scheduler = warmup_stable_decay needs lr_decay_steps")
    return Schedule(
        name=params.lr_scheduler,
        total_steps=total_steps,
        warmup_steps=warmup,
        decay_steps=resolve_steps(params.lr_decay_steps, total_steps),
        num_cycles=params.lr_scheduler_num_cycles,
        power=params.lr_scheduler_power,
        min_lr_ratio=params.lr_scheduler_min_lr_ratio,
        timescale=params.lr_scheduler_timescale,
        pieces=parse_pieces(rules["step_rules"]) if rules else (),
    )


def continued(schedule: Schedule, warmup_steps: int) -> Schedule:
    """Returns the schedule of a run that goes on: its warm-up keeps the length it began with."""
    return dataclasses.replace(schedule, warmup_steps=warmup_steps)


def _hashes(paths: Sequence[Path]) -> list[str]:
    return [hash_file(path) for path in paths]
