"""judge.json: what `sd3pipe judge` found, as it is written and read back by who reports, exports or shows it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sd3pipe.documents import MOST_BYTES, DocumentError, checked, read_json
from sd3pipe.errors import InputError
from sd3pipe.files import write_json

JUDGE_FOLDER, JUDGE_FILE = "judge", "judge.json"  # RUN/judge/judge.json, unless --out says otherwise
SCORES = ("likeness", "copying", "prompt", "drift", "variety")
FORMAT = 2  # 1 had likeness as a cosine
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A mean with its 95 % interval; without low and high where a single picture tells nothing of the spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def shown(self, form: str) -> str:
        """Returns the value with its interval, if there is one, in a number format such as '+.3f'."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:{form}} to {self.high:{form}})"
        return f"{self.value:{form}}{interval}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One checkpoint at one strength; each score is a difference from the base on equal noise, None if unknown.

    `close` says that it draws measurably nearer to single training pictures than those lie to each other, `drifts` that
    prompts without the trigger measurably lose more than the tolerance.
    """

    checkpoint: int | str  # its step, or the name of an adapter that has none
    multiplier: float
    likeness: Score | None
    likeness_held_out: Score | None
    copying: Score | None
    prompt: Score | None
    drift: Score | None
    variety: Score | None
    close: bool
    drifts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What to take; `checkpoint` is None where nothing is suggested. `sure`: the share of resamples that say the same.

    `told_apart` says whether any two checkpoints differ measurably; `draws_needed` about how many pictures it would
    take to tell the two most alike to the training pictures apart.
    """

    checkpoint: int | str | None
    multiplier: float | None
    sure: float | None
    told_apart: bool
    draws_needed: int | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Thumbnails of one prompt, as file names beside judge.json, base first and then as the scores stand."""

    prompt: str
    with_trigger: bool
    pictures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The whole of judge.json. `limits` has what may be lost, by score; `draws` the pictures behind each mean."""

    judge_model: str
    trigger: str
    tolerance: float
    limits: dict[str, float]
    draws: int
    scores: tuple[Scores, ...]
    suggestion: Suggestion
    remarks: tuple[str, ...]
    drawn: tuple[Drawn, ...]

    def save(self, folder: Path) -> Path:
        """Writes judge.json into a folder. Raises StorageError."""
        file = folder / JUDGE_FILE
        write_json(file, {"format": FORMAT, **asdict(self)})
        return file


def read_judgement(folder: Path) -> Judgement:
    """Returns what lies in a folder as judge.json. Raises InputError where there is none, or another format."""
    return read_result(folder / JUDGE_FILE, Judgement, "judge", FORMAT)


def read_result(file: Path, kind: type[T], command: str, version: int, *, most_bytes: int = MOST_BYTES) -> T:
    """Returns what a command of ours wrote. Raises InputError where there is none, or another format."""
    from pydantic import TypeAdapter  # takes 100 ms

    try:
        content = read_json(file, TypeAdapter(dict[str, Any]), most_bytes=most_bytes)
        if content.pop("format", None) != version:
            raise InputError(f"{file}: was written by another version: run `sd3pipe {command}` again")
        return checked(content, TypeAdapter(kind), str(file))
    except DocumentError as error:
        if error.missing:
            raise InputError(f"{file}: there is no such file: `sd3pipe {command}` writes it") from error
        raise InputError(f"{error}: run `sd3pipe {command}` again") from error
