"""Which optimizer takes how large steps, how many, and over how many pictures each."""

import re
from dataclasses import dataclass
from typing import Any

from sd3pipe.rules.declaring import rule
from sd3pipe.words import SchedulerName

# fmt: off


def _steps_or_ratio(value: Any) -> Any:
    """Returns "10%" as 0.1, as sd-scripts reads it. Raises ValueError for a share that would be read as steps."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", value) if isinstance(value, str) else None
    if match and float(match[1]) >= 100:
        raise ValueError("must be less than 100%")
    return float(match[1]) / 100 if match else value


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRules:
    """What turns gradients into steps."""

    learning_rate: float = rule(1e-4, "Learning rate.", gt=0, aliases=("unet_lr",))
    optimizer_type: str = rule(
        "AdamW", "AdamW, AdamW8bit, Lion, Adafactor, Prodigy, AdamWScheduleFree, ..., a class of torch.optim, or a "
        "dotted class path.", trust="code",
    )
    allow_code: bool = rule(
        False, "Import and run an optimizer that a parameter file names by a dotted class path.",
        role="free", advanced=True, trust="typed",
    )
    optimizer_args: tuple[str, ...] = rule(
        (), "Arguments of the optimizer as KEY=VALUE, such as weight_decay=0.01.", advanced=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRules:
    """How the learning rate goes over the steps, as the user describes it."""

    lr_scheduler: SchedulerName = rule("constant_with_warmup", "Learning rate over the steps.")
    lr_warmup_steps: float = rule(
        0.05, "Steps over which the learning rate rises; below 1 a share of all steps.", parse=_steps_or_ratio, ge=0
    )
    lr_decay_steps: float = rule(
        0.0, "Steps over which warmup_stable_decay falls; below 1 a share of all steps.",
        advanced=True, parse=_steps_or_ratio, ge=0,
    )
    lr_scheduler_num_cycles: int = rule(1, "Restarts of cosine_with_restarts.", advanced=True, ge=1)
    lr_scheduler_power: float = rule(1.0, "Power of polynomial.", advanced=True, gt=0)
    lr_scheduler_min_lr_ratio: float = rule(
        0.0, "Share of the learning rate at which a falling schedule ends.", advanced=True, ge=0, le=1
    )
    lr_scheduler_timescale: int | None = rule(
        None, "Steps that inverse_sqrt counts in; default: the warm-up.", advanced=True, ge=1
    )
    lr_scheduler_args: tuple[str, ...] = rule(
        (), "step_rules=FACTOR:STEP,FACTOR:STEP,FACTOR for piecewise_constant.", advanced=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """How many steps there are, and how many pictures each takes."""

    max_train_steps: int = rule(2000, "Steps to train.", role="free", ge=1)
    max_train_epochs: int | None = rule(
        None, "Epochs to train; overrides the steps.", role="free", advanced=True, overrides="max_train_steps", ge=1
    )
    train_batch_size: int = rule(1, "Pictures per forward pass.", ge=1)
    gradient_accumulation_steps: int = rule(  # times the processes, it is part of a run's identity
        1, "Forward passes per step, on each process.", role="free", ge=1
    )
