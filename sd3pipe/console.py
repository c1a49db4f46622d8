"""What the user sees: lines, progress, one summary line per stage and the stage's report file.

Only this module writes to the terminal. Names, captions and metadata may come from anywhere, so control characters are
shown, not sent, and nothing is read as markup of rich, which only this module uses.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import ExitCode, Sd3pipeError
from sd3pipe.files import make_folder, storage_errors, write_json

log = logging.getLogger(__name__)

_LINE_SHARE = 0.1  # without a terminal, one line per tenth of the work
_BEGAN = "began"  # in a report: false where the stage was refused before it made anything


def version() -> str:
    """Returns the installed version of sd3pipe."""
    return importlib.metadata.version("sd3pipe")


def setup_logging(*, verbose: bool = False) -> None:
    """Sends the package's log to stderr as plain lines, so that stdout stays for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger("sd3pipe")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


class _LineFormatter(logging.Formatter):
    """Formats a record as its message, with the level in front from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return one_line(prefix + record.getMessage())


def one_line(text: str) -> str:
    """Returns `text` with control characters escaped, so that a name with a newline stays on its line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(*lines: str) -> None:
    """Prints results, a line for each argument, with control characters escaped."""
    print(*map(one_line, lines), sep="\n", flush=True)


def say_error(line: str) -> None:
    """Prints what went wrong to stderr, with control characters escaped."""
    print(f"error: {one_line(line)}", file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """Prints a value as indented JSON in ASCII, in which JSON itself escapes control characters."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"), flush=True)


def say_table(rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> None:
    """Prints rows in columns; `colours` of words that fill a cell are shown on a terminal."""
    from rich.console import Console  # rich takes 60 ms to import
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(one_line(cell), style=colours.get(cell, "")) for cell in row))
    Console().print(table)


def hand_over(lines: Sequence[str]) -> None:
    """Prints lines for another program as they are, byte for byte; with control characters escaped on a terminal."""
    if sys.stdout.isatty():
        say(*lines)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(line) + b"\n" for line in lines))


def count(number: int, noun: str, plural: str = "") -> str:
    """Returns '1 picture', '2 pictures'."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Returns the first names, and how many more there are."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def readable_bytes(number: float) -> str:
    """Returns a size with three digits at the most and a decimal unit: '16.1 GB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def readable_seconds(seconds: float) -> str:
    """Returns a duration as people say it: '18.2 s', '4 min 10 s', '3 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class Progress(Protocol):
    def advance(self, number: int = 1, **fields: object) -> None:
        """Counts `number` more units; `fields` (loss, rate, memory) are shown behind the bar."""
        ...


@contextlib.contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Progress]:
    """Shows how far a loop has come: a bar on a terminal, one line per tenth of the work otherwise.

    `done` units were done by an earlier run: they count as done, but not for the rate.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit, done) as bar:
            yield bar
    else:
        yield _ProgressLines(description, total, unit, done)


class _ProgressLines:
    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._before = self._done = done
        self._next_line = done + max(1, round(total * _LINE_SHARE))
        self._start = time.monotonic()

    def advance(self, number: int = 1, **fields: object) -> None:
        self._done += number
        if self._done < self._next_line and self._done < self._total:
            return
        self._next_line = self._done + max(1, round(self._total * _LINE_SHARE))
        seconds = time.monotonic() - self._start
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        eta = readable_seconds((self._total - self._done) / rate) if rate else "?"
        shown = "".join(f", {name} {value}" for name, value in fields.items())
        log.info(
            "%s: %d/%d %s, %.3g/s, %s left%s",
            self._description, self._done, self._total, self._unit, rate, eta, shown,
        )  # fmt: skip


@contextlib.contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Progress]:
    from rich import progress as rich_progress  # rich takes 60 ms to import and is needed on a terminal only
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn(unit),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[shown]}", markup=False),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(one_line(description), total=total, completed=done, shown="")
        yield _ProgressBar(bars, task)


class _ProgressBar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task
        self._done, self._start = 0, time.monotonic()

    def advance(self, number: int = 1, **fields: object) -> None:
        self._done += number
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        shown = "  ".join([f"{rate:.3g}/s", *(f"{name} {value}" for name, value in fields.items())])
        self._bars.update(self._task, advance=number, shown=shown)


class StageReport:
    """Measures a stage, prints its summary line and writes its report file, also when the stage fails.

    The report holds stage, version, seconds, exit_code, inputs and whatever `update` was given. `summary` is the text
    of the line without stage and seconds. A stage that fails before it called `begin` has changed nothing: its report
    says so, and leaves an earlier one that tells of work, for it then becomes OUT.refused.report.json.
    """

    def __init__(self, stage: str, path: Path, inputs: dict[str, Any]) -> None:
        self.stage, self.path, self.inputs = stage, path, inputs
        self.summary = ""
        self.values: dict[str, Any] = {}
        self._began = False

    def begin(self) -> None:
        """Says that something was made: from here on the report belongs to this call, also if it fails."""
        self._began = True

    def update(self, **values: Any) -> None:
        """Adds values (JSON types) to the report."""
        self.values.update(values)

    def keep(self, **otherwise: Any) -> None:
        """Takes over the values of the report that is there, or else `otherwise`, for a stage without work."""
        there: dict[str, Any] = {}
        with contextlib.suppress(DocumentError):
            there = self._read()
        for name in ("error", _BEGAN):
            there.pop(name, None)
        self.values = {**otherwise, **there, **self.values}

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._start
        if error is None:
            say(f"{self.stage}: {self.summary or 'done'}, {readable_seconds(seconds)}")
        with contextlib.suppress(Sd3pipeError) if error is not None else contextlib.nullcontext():
            self._write(seconds, error)

    def _write(self, seconds: float, error: BaseException | None) -> None:
        report = {
            **self.values,
            "stage": self.stage,
            "version": version(),
            "seconds": round(seconds, 3),
            "exit_code": _exit_code(error),
            "inputs": self.inputs,
        }
        path, refused = self.path, _refusal_path(self.path)
        if error is not None:
            report["error"] = one_line(str(error))
        if error is not None and not self._began:
            report[_BEGAN] = False
            path = refused if self._tells_of_work() else self.path
        make_folder(path.parent)
        write_json(path, report)
        if path is self.path:
            with storage_errors(refused):
                refused.unlink(missing_ok=True)

    def _tells_of_work(self) -> bool:
        """Whether the report that is there is not that of a refusal; a damaged one may tell of anything."""
        try:
            return self._read().get(_BEGAN) is not False
        except DocumentError as error:
            return not error.missing

    def _read(self) -> dict[str, Any]:
        from pydantic import TypeAdapter  # takes 100 ms; `sd3pipe --help` imports this module

        return read_json(self.path, TypeAdapter(dict[str, Any]))


def _refusal_path(report: Path) -> Path:
    """Returns where the report of a stage goes that was refused, beside OUT and kept out of git and DVC like all."""
    out = report.parent if report.name == "report.json" else report.with_name(report.name.removesuffix(".report.json"))
    return Path(f"{out.absolute()}.refused.report.json")


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return ExitCode.DONE
    if isinstance(error, Sd3pipeError):
        return error.exit_code
    return ExitCode.BUG
