"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

Names and shapes are those of transformers.optimization, which sd-scripts uses. Two things differ: no warm-up begins
with a step of rate 0, and every schedule that falls may end at `min_lr_ratio` instead of 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from sd3pipe.errors import ParameterError
from sd3pipe.rules.optimisation import ScheduleRules
from sd3pipe.words import SchedulerName

# the learning rate of a step does not depend on how many steps follow, so the run may be extended
EXTENDABLE: tuple[SchedulerName, ...] = ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule with its numbers resolved to steps; `pieces` holds (first step, factor) pairs."""

    rules: ScheduleRules
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    pieces: tuple[tuple[int, float], ...] = ()

    def factor(self, step: int) -> float:
        """Returns what the learning rate is multiplied by at `step`, counted from 0."""
        name, least = self.rules.lr_scheduler, self.rules.lr_scheduler_min_lr_ratio
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if name in EXTENDABLE:
            return _EXTENDABLE_SHAPES[name](self, step)
        return least + (1 - least) * _FALLING_SHAPES[name](self, step)

    def progress(self, step: int) -> float:
        """Returns the share of the steps after warm-up that are done, in [0, 1]."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


def make_schedule(rules: ScheduleRules, total_steps: int) -> Schedule:
    """Returns the learning rate's course. Raises ParameterError where its options do not fit together."""
    name = rules.lr_scheduler
    args = {key: value for key, _, value in (arg.partition("=") for arg in rules.lr_scheduler_args)}
    if set(args) - {"step_rules"} or (bool(args) != (name == "piecewise_constant")):
        raise ParameterError(
            "lr_scheduler_args: step_rules=... belongs to piecewise_constant, which needs it; there are no others"
        )
    if name == "warmup_stable_decay" and not rules.lr_decay_steps:
        raise ParameterError("lr_scheduler = warmup_stable_decay needs lr_decay_steps")
    return Schedule(
        rules=rules,
        total_steps=total_steps,
        warmup_steps=0 if name == "constant" else resolve_steps(rules.lr_warmup_steps, total_steps),
        decay_steps=resolve_steps(rules.lr_decay_steps, total_steps),
        pieces=parse_pieces(args["step_rules"]) if args else (),
    )


def continued(schedule: Schedule, warmup_steps: int) -> Schedule:
    """Returns the schedule of a run that goes on: its warm-up keeps the length it began with."""
    return replace(schedule, warmup_steps=warmup_steps)


def resolve_steps(value: float, total_steps: int) -> int:
    """Returns a number of steps from a count, or from a ratio of all steps if it is below 1."""
    return round(value * total_steps) if value < 1 else int(value)


def parse_pieces(rules: str) -> tuple[tuple[int, float], ...]:
    """Returns the pieces of step rules: "1:10,0.1:20,0.01" is 1 below step 10, 0.1 below step 20, then 0.01."""
    *pieces, last = rules.split(",")
    try:
        starts, factors = [0], []
        for piece in pieces:
            factor, end = piece.split(":")
            factors.append(float(factor))
            starts.append(int(end))
        return tuple(zip(starts, [*factors, float(last)], strict=True))
    except ValueError as error:
        raise ParameterError(
            f"lr_scheduler_args: step_rules={rules}: write FACTOR:STEP,FACTOR:STEP,FACTOR, such as 1:500,0.1:800,0.01"
        ) from error


def _constant(schedule: Schedule, step: int) -> float:
    return 1.0


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    timescale = schedule.rules.lr_scheduler_timescale or schedule.warmup_steps or 10_000  # as in transformers
    return 1 / math.sqrt((step - schedule.warmup_steps + timescale) / timescale)


def _piecewise_constant(schedule: Schedule, step: int) -> float:
    return [factor for start, factor in schedule.pieces if start <= step][-1]


def _linear(schedule: Schedule, step: int) -> float:
    return 1.0 - schedule.progress(step)


def _cosine(schedule: Schedule, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * schedule.progress(step)))


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    progress = schedule.progress(step)
    of_cycle = (schedule.rules.lr_scheduler_num_cycles * progress) % 1
    return 0.5 * (1 + math.cos(math.pi * of_cycle)) if progress < 1 else 0.0


def _polynomial(schedule: Schedule, step: int) -> float:
    return (1 - schedule.progress(step)) ** schedule.rules.lr_scheduler_power


def _warmup_stable_decay(schedule: Schedule, step: int) -> float:
    remaining = max(0, schedule.total_steps - step)
    return 0.5 * (1 - math.cos(math.pi * min(1.0, remaining / schedule.decay_steps))) if schedule.decay_steps else 1.0


_EXTENDABLE_SHAPES: dict[SchedulerName, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "piecewise_constant": _piecewise_constant,
}
_FALLING_SHAPES: dict[SchedulerName, Callable[[Schedule, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine,
    "polynomial": _polynomial,
    "warmup_stable_decay": _warmup_stable_decay,
}
