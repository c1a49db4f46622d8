"""Reads what a run folder tells about itself."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import FiniteFloat, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.data.headers import DECODER_ERRORS, open_picture, reason
from sd3pipe.data.places import read_picture
from sd3pipe.data.png import text_of
from sd3pipe.documents import read_json
from sd3pipe.errors import InputError, UnreadablePicture
from sd3pipe.files import nearest_path
from sd3pipe.judgement import JUDGE_FILE, JUDGE_FOLDER, Judgement, read_judgement
from sd3pipe.metrics import EventRecord, StepRecord, ValidationRecord, read_records
from sd3pipe.picture_losses import PICTURES_FILE, PictureLosses, read_picture_losses

log = logging.getLogger(__name__)

T = TypeVar("T")

_SAMPLE_NAME = re.compile(r"step-?(\d+)")
_PICTURES = (".png", ".jpg", ".webp")
_SHOWN_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_BYTES, _MOST_PIXELS = 100_000_000, 4096 * 4096  # the largest samples that are drawn, and their bytes in a PNG


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePicture:
    """One sample picture: which prompt it answers, and after how many steps."""

    prompt: str
    title: str  # the prompt's words, as far as the picture's file says
    step: int
    kind: str  # png, jpeg or webp
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its folder describes it; whatever is missing is empty."""

    folder: Path
    report: dict[str, Any]
    inputs: dict[str, Any]
    steps: list[StepRecord]
    validations: list[ValidationRecord]
    events: list[EventRecord]
    samples: list[SamplePicture]
    judgement: Judgement | None
    pictures: tuple[PictureLosses, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def encoded(self, cache: str) -> dict[str, Any]:
        """Returns what the run noted of the stage that had filled its cache of text or of latents."""
        return (self.report.get("encoded") or {}).get(cache) or {}


_Numbers = dict[str, FiniteFloat]


@with_config(extra="allow")
class _Data(TypedDict, total=False):
    subsets: dict[str, dict[str, JsonValue]] | None
    buckets: _Numbers | None


@with_config(extra="allow")
class _Prediction(TypedDict, total=False):
    predicted: FiniteFloat | None
    measured: FiniteFloat | None


@with_config(extra="allow")
class _Memory(TypedDict, total=False):
    device_bytes: _Prediction | None
    seconds_per_step: _Prediction | None


@with_config(extra="allow")
class _Captions(TypedDict, total=False):
    most_frequent: _Numbers | None


@with_config(extra="allow")
class _Encoded(TypedDict, total=False):
    captions: _Captions | None
    cut: int | None
    seconds: FiniteFloat


@with_config(extra="allow")
class _About(TypedDict, total=False):
    """The parts of a report, or of final/inputs.json, that the page does more with than to show them."""

    options: dict[str, JsonValue] | None
    data: _Data | None
    memory: _Memory | None
    encoded: dict[str, _Encoded | None] | None
    subsets: dict[str, dict[str, JsonValue]] | None
    phases: _Numbers | None
    peak_rss_bytes: FiniteFloat | None
    peak_device_bytes: FiniteFloat | None
    streamed_bytes: FiniteFloat | None


_ABOUT = TypeAdapter(_About)


def read_run(folder: Path) -> RunRecord:
    """Returns the record of a run. Raises InputError if the folder holds no run."""
    if not folder.exists():
        raise InputError(f"{folder}: there is no such folder{nearest_path(folder)}")
    records = list(read_records(folder))
    report = _said(folder / "report.json", _read_about, {})
    if not records and not report:
        raise InputError(f"{folder}: is no run folder: it has neither metrics.jsonl nor report.json")
    return RunRecord(
        folder=folder,
        report=report,
        inputs=_said(folder / "final" / "inputs.json", _read_about, {}),
        steps=[record for record in records if record["kind"] == "step"],
        validations=[record for record in records if record["kind"] == "validation"],
        events=[record for record in records if record["kind"] == "event"],
        samples=list(_samples(folder)),
        judgement=_said(folder / JUDGE_FOLDER / JUDGE_FILE, lambda file: read_judgement(file.parent), None),
        pictures=_said(folder / PICTURES_FILE, lambda file: read_picture_losses(file.parent), ()),
    )


def _read_about(file: Path) -> dict[str, Any]:
    return dict(read_json(file, _ABOUT))


def _said(file: Path, read: Callable[[Path], T], nothing: T) -> T:
    """Returns what a file of the run says; nothing where it is missing, or damaged, which is told."""
    if not file.exists():
        return nothing
    try:
        return read(file)
    except InputError as error:
        log.warning("%s: left out of the report", error)
        return nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFile:
    """A file that by its name is a sample picture; nobody has looked into it."""

    path: Path
    prompt: str
    step: int


def sample_files(run: Path) -> list[SampleFile]:
    """Returns the pictures whose names, or folders' names, say a step; the rest of the name stands for the prompt."""
    folder = run / "samples"
    found = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = str(path.relative_to(folder))
        match = _SAMPLE_NAME.search(name)
        if path.suffix.lower() in _PICTURES and match:
            prompt = (name[: match.start()] + name[match.end() :]).strip("-_/ ").removesuffix(path.suffix).strip("-_/ ")
            found.append(SampleFile(path=path, prompt=prompt or "sample", step=int(match[1])))
    return found


def _samples(run: Path) -> Iterator[SamplePicture]:
    for file in sample_files(run):
        try:
            kind, data, title = read_picture_of(file.path, run)
        except UnreadablePicture as error:
            log.warning("%s: is not shown: %s", file.path, error)
            continue
        yield SamplePicture(prompt=file.prompt, title=title, step=file.step, kind=kind, data=data)


def read_picture_of(path: Path, run: Path) -> tuple[str, bytes, str]:
    """Returns kind, bytes and title of a picture file that lies inside the run, behind links, too, and decodes whole.

    Raises UnreadablePicture.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(run)):
        raise UnreadablePicture("it is a link that leads out of the run")
    data = read_picture(real, _MOST_BYTES)
    image = open_picture(data, max_pixels=_MOST_PIXELS)
    if image.format not in _SHOWN_FORMATS:
        raise UnreadablePicture(f"{image.format} is not what a browser shows")
    try:
        image.load()
        return image.format.lower(), data, text_of(data, "Description")
    except DECODER_ERRORS as error:
        raise UnreadablePicture(f"it is damaged ({reason(error)})") from error
