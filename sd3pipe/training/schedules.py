"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

Names and shapes are those of transformers.optimization, which sd-scripts uses. Two things differ: no warm-up begins
with a step of rate 0, and every schedule that falls may end at `min_lr_ratio` instead of 0.
"""

import math
from dataclasses import dataclass

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
        after = step - self.warmup_steps
        if after < 0:
            return (step + 1) / (self.warmup_steps + 1)
        match self.rules.lr_scheduler:
            case "constant" | "constant_with_warmup":
                return 1.0
            case "inverse_sqrt":
                timescale = self.rules.lr_scheduler_timescale or self.warmup_steps or 10_000  # as in transformers
                return 1 / math.sqrt((after + timescale) / timescale)
            case "piecewise_constant":
                return [factor for start, factor in self.pieces if start <= step][-1]
            case _:
                least = self.rules.lr_scheduler_min_lr_ratio
                return least + (1 - least) * self._falling(step)

    def _falling(self, step: int) -> float:
        """Returns the factor of a schedule that falls from 1 after its warm-up, to 0."""
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        match self.rules.lr_scheduler:
            case "cosine" | "cosine_with_min_lr":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_with_restarts":
                of_cycle = (self.rules.lr_scheduler_num_cycles * progress) % 1
                return 0.5 * (1 + math.cos(math.pi * of_cycle)) if progress < 1 else 0.0
            case "polynomial":
                return (1 - progress) ** self.rules.lr_scheduler_power
            case "warmup_stable_decay":
                remaining = max(0, self.total_steps - step)
                share = min(1.0, remaining / self.decay_steps) if self.decay_steps else 1.0
                return 0.5 * (1 - math.cos(math.pi * share))
            case _:  # linear
                return 1.0 - progress


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
