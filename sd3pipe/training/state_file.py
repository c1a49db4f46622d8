"""state.json of a checkpoint: how far the run is, and what it and the files beside it were when it was written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from pydantic import Field, JsonValue, StrictInt, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.documents import checked, parse_json, read_data
from sd3pipe.errors import InputError
from sd3pipe.files import write_json
from sd3pipe.fingerprint import hash_bytes

FORMAT_VERSION = 1
_DIGEST = "digest"

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
