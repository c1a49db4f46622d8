"""state.json of a checkpoint: how far the run is, and what it and the files beside it were when it was written."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, JsonValue, StrictInt, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.documents import checked, parse_json, read_data
from sd3pipe.errors import InputError
from sd3pipe.files import write_json
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.training.batches import Position, StepPlan

FORMAT_VERSION = 1
_DIGEST = "digest"
_MEAN_OVER = 50  # steps that the shown loss is averaged over, exponentially

Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
_Number = Annotated[float, Field(strict=True)]


class FileIdentity(TypedDict):
    bytes: Count
    blake3: str


class LossScale(TypedDict):
    """The fp16 loss scale, as torch's GradScaler has it."""

    scale: _Number
    growth_factor: _Number
    backoff_factor: _Number
    growth_interval: Count
    _growth_tracker: Count


@with_config(extra="allow")
class State(TypedDict):
    """What state.json says, but for its digest."""

    step: Count
    files: dict[Literal["adapter.safetensors", "optimizer.safetensors"], FileIdentity]
    identity: dict[str, JsonValue]
    position: Annotated[list[Count], Field(min_length=2, max_length=2)]  # epoch and batch
    epochs_done: Count
    loss_first: _Number | None
    loss_last: _Number | None
    loss_mean: _Number | None
    skipped_steps: list[Count]
    best_step: Count | None
    best_loss: _Number | None
    warmup_steps: Count
    optimizer: dict[str, JsonValue]
    loss_scale: NotRequired[LossScale]
    owed: NotRequired[list[str]]  # checkpoints of versions that do not know it owe nothing
    changes: NotRequired[list[dict[str, JsonValue]]]


_STATE = TypeAdapter(State)
_OBJECT = TypeAdapter(dict[str, JsonValue])


def write_state(path: Path, state: Mapping[str, object]) -> State:
    """Writes a state with its digest and returns it as it will be read. Raises StorageError."""
    content = json.loads(json.dumps({**state, "format": FORMAT_VERSION}))
    write_json(path, {**content, _DIGEST: _digest(content)})
    return _STATE.validate_python(content)


def read_state(path: Path) -> State:
    """Returns the state in a file; one that was written before states had a digest is taken at its word.

    Raises InputError for one that is damaged or was changed.
    """
    content = parse_json(read_data(path), _OBJECT, str(path))
    version, digest = content.get("format"), content.pop(_DIGEST, None)
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has checkpoint format {version}, this sd3pipe reads {FORMAT_VERSION}")
    if digest is not None and digest != _digest(content):
        raise InputError(f"{path} was changed after the run wrote it")
    return checked(content, _STATE, str(path))


def _digest(content: Mapping[str, object]) -> str:
    """Returns the hash of JSON types; unlike other content, losses may be NaN."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hash_bytes(text.encode("utf-8", "surrogatepass"))


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

    def to_state(self) -> dict[str, object]:
        """Returns JSON types."""
        return {**asdict(self), "position": [self.position.epoch, self.position.index]}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Returns what `to_state` was made from; other keys of the state are passed over."""
        epoch, index = state["position"]
        known: dict[str, Any] = {name: value for name, value in state.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "position": Position(epoch=epoch, index=index)})
