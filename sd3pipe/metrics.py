"""metrics.jsonl of a run: one line for each step, validation and event, as they come back from the disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, cast

from pydantic import Field, StrictInt, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.documents import DocumentError, checked, parse_json
from sd3pipe.files import open_regular

METRICS_FILE = "metrics.jsonl"
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of a validation: the middles of five bands of equal width
BAND_NAMES = tuple(f"sigma_{sigma}" for sigma in SIGMAS)

if TYPE_CHECKING:
    Number = float
    Count = int
else:
    Number = Annotated[float, Field(strict=True)]  # NaN and infinity are numbers here: a loss may be either
    Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]


@with_config(extra="allow")
class StepRecord(TypedDict):
    """What one training step measured."""

    kind: Literal["step"]
    step: Count
    loss: Number
    loss_mean: Number | None
    learning_rate: NotRequired[Number]
    subset_loss: NotRequired[dict[str, Number]]
    subset_samples: NotRequired[dict[str, Count]]
    samples: NotRequired[list[tuple[str, Number, Number]]]  # picture, noise level and loss of each


@with_config(extra="allow")
class ValidationRecord(TypedDict):
    """What one validation measured: the mean over the held-out pictures, each of them, and by noise level."""

    kind: Literal["validation"]
    step: Count
    loss: Number
    ci95: Number | None
    bands: dict[str, Number]
    by_picture: NotRequired[list[Number]]


@with_config(extra="allow")
class EventRecord(TypedDict):
    """Something that happens seldom."""

    kind: Literal["event"]
    step: Count


Record = StepRecord | ValidationRecord | EventRecord
_OBJECT = TypeAdapter(dict[str, Any])
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


class RecordTail:
    """The records of a run as it goes on: each call of `read` returns those that were added since."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._inode, self._place = 0, 0

    def read(self) -> tuple[list[Record], bool]:
        """Returns the added records, and whether the file began anew, so that all earlier ones are void."""
        try:
            with open_regular(self.run / METRICS_FILE) as file:
                stat = os.fstat(file.fileno())
                anew = stat.st_ino != self._inode or stat.st_size < self._place
                if anew:
                    self._inode, self._place = stat.st_ino, 0
                file.seek(self._place)
                lines = file.read().split(b"\n")
        except OSError:
            anew = self._inode != 0
            self._inode, self._place = 0, 0
            return [], anew
        self._place += sum(len(line) + 1 for line in lines[:-1])  # the last line may be half written
        records: list[Record] = []
        for line in lines[:-1]:
            with contextlib.suppress(ValidationError):
                records.append(_RECORD.validate_json(line))
        return records, anew


def read_records(run: Path) -> Iterator[Record]:
    """Yields what the lines of a run's metrics say; a line that was cut short by a crash, or is damaged, is none."""
    try:
        with open_regular(run / METRICS_FILE) as file:
            for line in file:
                try:
                    value = parse_json(line, _OBJECT, METRICS_FILE)
                    checked(value, _RECORD, METRICS_FILE)
                    yield cast(Record, value)  # as it stands: tables keep the order of its numbers
                except DocumentError:
                    continue
    except OSError:
        return
