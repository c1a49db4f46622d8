"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

Names and shapes are those of transformers.optimization, which sd-scripts uses. Two things differ: no warm-up begins
with a step of rate 0, and every schedule that falls may end at `min_lr_ratio` instead of 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sd3pipe.errors import ParameterError

SchedulerName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "piecewise_constant",
]

# the learning rate of a step does not depend on how many steps follow, so the run may be extended
EXTENDABLE: tuple[SchedulerName, ...] = ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule with its numbers resolved to steps; `pieces` holds (first step, factor) pairs."""

    name: SchedulerName
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    num_cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0
    timescale: int | None = None
    pieces: tuple[tuple[int, float], ...] = ()

    def factor(self, step: int) -> float:
        """Returns what the learning rate is multiplied by at `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name in EXTENDABLE:
            return _EXTENDABLE_SHAPES[self.name](self, step)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * _FALLING_SHAPES[self.name](self, step)

    def progress(self, step: int) -> float:
        """Returns the share of the steps after warm-up that are done, in [0, 1]."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


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
    timescale = schedule.timescale or schedule.warmup_steps or 10_000  # as in transformers
    return 1 / math.sqrt((step - schedule.warmup_steps + timescale) / timescale)


def _piecewise_constant(schedule: Schedule, step: int) -> float:
    return [factor for start, factor in schedule.pieces if start <= step][-1]


def _linear(schedule: Schedule, step: int) -> float:
    return 1.0 - schedule.progress(step)


def _cosine(schedule: Schedule, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * schedule.progress(step)))


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    progress = schedule.progress(step)
    return 0.5 * (1 + math.cos(math.pi * ((schedule.num_cycles * progress) % 1))) if progress < 1 else 0.0


def _polynomial(schedule: Schedule, step: int) -> float:
    return (1 - schedule.progress(step)) ** schedule.power


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
