"""How far a run is: the small numbers that go into every checkpoint beside the tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from sd3pipe.training.batches import Position, StepPlan
from sd3pipe.training.state_file import State

_MEAN_OVER = 50  # steps that the shown loss is averaged over, exponentially


@dataclass(slots=True, kw_only=True)
class Progressed:
    """`step` counts the steps done; `skipped_steps` are those that a bad loss made the run leave out.

    `owed` names what is due after this step and not done: validation, samples.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    epochs_done: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_mean: float | None = None
    skipped_steps: list[int] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    owed: list[str] = field(default_factory=list)

    def passed(self, plan: StepPlan, loss: float | None) -> None:
        """Counts a step; `loss` is None where it was skipped."""
        if loss is not None:
            self.loss_first = loss if self.loss_first is None else self.loss_first
            self.loss_last = loss
            weight = 1 / min(self.step + 1, _MEAN_OVER)
            self.loss_mean = loss if self.loss_mean is None else self.loss_mean + weight * (loss - self.loss_mean)
        self.step += 1
        self.position, self.epochs_done = plan.end, plan.epochs_done

    def become(self, other: "Progressed") -> None:
        """Takes over all numbers of another one."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(other, name))

    def to_state(self) -> dict[str, object]:
        """Returns JSON types."""
        return {**asdict(self), "position": [self.position.epoch, self.position.index]}

    @classmethod
    def from_state(cls, state: State) -> "Progressed":
        """Returns what `to_state` was made from; other keys of the state are passed over."""
        epoch, index = state["position"]
        known: dict[str, Any] = {name: value for name, value in state.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "position": Position(epoch=epoch, index=index)})
