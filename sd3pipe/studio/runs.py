"""A run as its folder tells it, kept up to date by reading only what was added."""

import math
import statistics
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.adapters.find import checkpoint_adapters
from sd3pipe.cache.folder import apart_folder
from sd3pipe.config import Project
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError, UnreadablePicture
from sd3pipe.metrics import METRICS_FILE, Record, RecordTail
from sd3pipe.reporting.collect import read_picture_of, sample_files
from sd3pipe.studio.places import path_of

MOST_POINTS = 1200
_RECENT = 50  # steps whose pace counts


class Curves:
    """The numbers of every step as columns; `generation` rises whenever all that was read before is void."""

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self.columns = {name: array("d") for name in ("step", "loss", "loss_mean", "learning_rate", "seconds")}
        self.validations: list[list[float | None]] = []  # step, loss, half of the interval

    def __len__(self) -> int:
        return len(self.columns["seconds"])  # the last to be written

    @property
    def mark(self) -> str:
        """How much this is: whoever has it can be told what came since."""
        return f"{self.generation}:{len(self)}"

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["kind"] == "step":
                for name, column in self.columns.items():
                    value = record.get(name)
                    column.append(math.nan if value is None else float(value))
            elif record["kind"] == "validation":
                self.validations.append([record["step"], _finite(record["loss"]), _finite(record["ci95"] or 0.0)])

    def points(self, first: int = 0, most: int | None = None) -> list[list[float | None]]:
        """Returns [step, loss, running mean, learning rate] from a row on; at most about `most`, with all extremes."""
        rows = range(first, len(self))
        chosen = rows if most is None else _kept(self.columns["loss"], rows, most)
        columns = [self.columns[name] for name in ("step", "loss", "loss_mean", "learning_rate")]
        return [[_finite(column[row]) for column in columns] for row in chosen]

    @property
    def step(self) -> int:
        return int(self.columns["step"][-1]) if len(self) else 0

    @property
    def seconds_per_step(self) -> float | None:
        recent = [value for value in self.columns["seconds"][-_RECENT:] if math.isfinite(value)]
        return statistics.median(recent) if recent else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How train ended last, as the run's report says; `at` is when, in seconds since 1970."""

    exit_code: int
    error: str = ""
    at: float = 0.0


_END = TypeAdapter(RunEnd)


class RunView:
    """A run folder, or that in which the run writes as long as an older one lies in its place."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._tail = RecordTail(place)
        self.curves = Curves()
        self._titles: dict[str, str] = {}
        self._lock = threading.Lock()  # pages and watchers read, each in a thread of its own

    @property
    def folder(self) -> Path:
        apart = apart_folder(self.place)
        return apart if (apart / METRICS_FILE).is_file() else self.place

    def read(self) -> None:
        """Takes over what was recorded since the last call."""
        with self._lock:
            folder = self.folder
            if folder != self._tail.run:
                self._tail = RecordTail(folder)
                self._forget()
            records, anew = self._tail.read()
            if anew and len(self.curves):
                self._forget()
            self.curves.add(records)

    def _forget(self) -> None:
        self.curves = Curves(self.curves.generation + 1)

    def samples(self) -> dict[str, Any]:
        """Returns the steps with samples, and each prompt's pictures by step as addresses below the project."""
        prompts: dict[str, dict[str, Any]] = {}
        for file in sample_files(self.folder):
            entry = prompts.setdefault(file.prompt, {"title": "", "pictures": {}})
            if not self._titles.get(file.prompt):
                self._titles[file.prompt] = self._title(file.path)
            entry["title"] = self._titles[file.prompt] or file.prompt
            entry["pictures"][str(file.step)] = file.path.relative_to(self.folder).as_posix()
        steps = sorted({int(step) for entry in prompts.values() for step in entry["pictures"]})
        return {"steps": steps, "prompts": [prompts[name] for name in sorted(prompts)]}

    def _title(self, path: Path) -> str:
        try:
            return read_picture_of(path, self.folder)[2]
        except UnreadablePicture:
            return ""

    def checkpoints(self) -> dict[int, Path]:
        return checkpoint_adapters(self.folder)

    def end(self) -> RunEnd | None:
        """Returns how train ended last; None where it never did, or what it wrote cannot be read."""
        file = self.folder / "report.json"
        try:
            return replace(read_json(file, _END), at=file.stat().st_mtime)
        except (DocumentError, OSError):
            return None

    def is_finished(self) -> bool:
        return (self.place / "final" / "inputs.json").is_file()


def run_place(project: Project, name: str = "") -> Path:
    """Returns the project's run, or the one of that name beside it. Raises InputError where there is none."""
    place = path_of(project, "run")
    if not name or name == place.name:
        return place
    if name not in run_names(project):
        raise InputError(f"{place.parent}: there is no run of this name")
    return place.with_name(name)


def run_names(project: Project) -> list[str]:
    """Returns the names of the runs in the folder of the project's own, which comes first."""
    place = path_of(project, "run")
    others = sorted(path.parent.name for path in place.parent.glob(f"*/{METRICS_FILE}"))
    return [place.name, *(name for name in others if name != place.name)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _kept(values: Sequence[float], rows: range, most: int) -> Iterator[int]:
    """Yields rows in their order: of each stretch of equal length the first, the lowest and the highest value's."""
    if len(rows) <= most:
        yield from rows
        return
    width, at = math.ceil(len(rows) * 3 / most), set()
    for start in range(rows.start, rows.stop, width):
        stretch = range(start, min(start + width, rows.stop))
        finite = [row for row in stretch if math.isfinite(values[row])] or [stretch[0]]
        at = {stretch[0], min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        yield from sorted(at)
    if rows[-1] not in at:
        yield rows[-1]
