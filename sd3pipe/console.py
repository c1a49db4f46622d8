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
from sd3pipe.errors import ExitCode, Sd3pipeError, of_system
from sd3pipe.files import make_folder, storage_errors, write_json

log = logging.getLogger(__name__)

_LINE_SHARE = 0.1  # without a terminal, one line per tenth of the work
_BEGAN = "began"  # in a report: false where the stage was refused before it made anything
_INNER_LINE_SECONDS = 10.0  # and for work within other work not more often than that


def version() -> str:
    """Returns the installed version of sd3pipe."""
    return importlib.metadata.version("sd3pipe")


def setup_logging() -> None:
    """Sends the package's log to stderr as plain lines, so that stdout stays for results."""
    handler = _StderrHandler()
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger("sd3pipe")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _StderrHandler(logging.Handler):
    """Prints to what sys.stderr is at the time: while a bar is shown, to that which prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(self.format(record), file=sys.stderr, flush=True)


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


def say_aside(line: str) -> None:
    """Prints what is no result, as what went wrong, to stderr, with control characters escaped."""
    print(one_line(line), file=sys.stderr, flush=True)


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

    `done` units were done by an earlier run: they count as done, but not for the rate. Work within work has a bar of
    its own below the other, and its time does not count for the other's rate.
    """
    start, work = time.monotonic(), (description, total, unit, done)
    with _bar(*work) if sys.stderr.isatty() else contextlib.nullcontext(_ProgressLines(*work)) as shown:
        _at_work.append(shown)
        try:
            yield shown
        finally:
            _at_work.pop()
            if _at_work:
                _at_work[-1].rate.pause(time.monotonic() - start)


class _Rate:
    """Units per second, or seconds per unit where that is the larger number."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leaves a time out."""
        self._start += seconds

    def per_second(self, units: int) -> float:
        seconds = time.monotonic() - self._start
        return units / seconds if seconds > 0 else 0.0

    def shown(self, units: int) -> str:
        rate = self.per_second(units)
        return f"{1 / rate:.3g} s/it" if 0 < rate < 1 else f"{rate:.3g}/s"


class _ProgressLines:
    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._before = self._done = done
        self._next_line = done + max(1, round(total * _LINE_SHARE))
        self._quiet_until = time.monotonic() + _INNER_LINE_SECONDS if _at_work else 0.0
        self.rate = _Rate()

    def advance(self, number: int = 1, **fields: object) -> None:
        self._done += number
        now = time.monotonic()
        if now < self._quiet_until or (self._done < self._next_line and self._done < self._total):
            return
        self._next_line = self._done + max(1, round(self._total * _LINE_SHARE))
        self._quiet_until = now + _INNER_LINE_SECONDS if self._quiet_until else 0.0
        rate = self.rate.per_second(self._done - self._before)
        eta = readable_seconds((self._total - self._done) / rate) if rate else "?"
        shown = "".join(f", {name} {value}" for name, value in fields.items())
        log.info(
            "%s: %d/%d %s, %s, %s left%s",
            self._description, self._done, self._total, self._unit, self.rate.shown(self._done - self._before), eta,
            shown,
        )  # fmt: skip


@contextlib.contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator["_ProgressBar"]:
    outer = next((shown for shown in _at_work if isinstance(shown, _ProgressBar)), None)
    with contextlib.nullcontext(outer.bars) if outer else _bars() as bars:
        task = bars.add_task(one_line(description), total=total, completed=done, unit=unit, shown="")
        try:
            yield _ProgressBar(bars, task)
        finally:
            if outer:
                bars.remove_task(task)


def _bars() -> Any:
    """Returns an empty display of bars; where the terminal is narrow, what stands behind the times is cut first."""
    from rich import progress as rich_progress  # rich takes 60 ms to import and is needed on a terminal only
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    whole, cut = Column(no_wrap=True), Column(overflow="ellipsis")

    class Fields(rich_progress.TextColumn):
        def render(self, task: rich_progress.Task) -> Any:
            text = super().render(task)
            text.no_wrap = True
            return text

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(min(40, max(8, console.width - 100)), table_column=whole.copy()),
        rich_progress.MofNCompleteColumn(table_column=whole.copy()),
        rich_progress.TextColumn("{task.fields[unit]}", markup=False),
        rich_progress.TimeElapsedColumn(table_column=whole.copy()),
        rich_progress.TimeRemainingColumn(table_column=whole.copy()),
        Fields("{task.fields[shown]}", markup=False, table_column=cut),
        console=console,
    )


class _ProgressBar:
    def __init__(self, bars: Any, task: Any) -> None:
        self.bars, self._task, self._done = bars, task, 0
        self.rate = _Rate()

    def advance(self, number: int = 1, **fields: object) -> None:
        self._done += number
        shown = "  ".join([self.rate.shown(self._done), *(f"{name} {value}" for name, value in fields.items())])
        self.bars.update(self._task, advance=number, shown=shown)


_at_work: list[_ProgressBar | _ProgressLines] = []  # the outermost first


class StageReport:
    """Measures a stage, prints its summary line and writes its report file, also when the stage fails.

    The report holds stage, version, seconds, exit_code, inputs and whatever `update` was given. `summary` is the text
    of the line without stage and seconds. A stage that fails before it called `begin` has changed nothing: its report
    says so, and leaves an earlier one that tells of work, for it then becomes OUT.refused.report.json.
    """

    def __init__(self, stage: str, path: Path, inputs: Mapping[str, object]) -> None:
        self.stage, self.path, self.inputs = stage, path, inputs
        self.summary = ""
        self.values: dict[str, object] = {}
        self._began = False

    def begin(self) -> None:
        """Says that something was made: from here on the report belongs to this call, also if it fails."""
        self._began = True

    def update(self, **values: object) -> None:
        """Adds values (JSON types) to the report."""
        self.values.update(values)

    def keep(self, **otherwise: object) -> None:
        """Takes over the values of the report that is there, or else `otherwise`, for a stage without work."""
        there: dict[str, object] = {}
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
        error = of_system(error) or error
        failed = error.exit_code if isinstance(error, Sd3pipeError) else ExitCode.BUG
        report = {
            **self.values,
            "stage": self.stage,
            "version": version(),
            "seconds": round(seconds, 3),
            "exit_code": ExitCode.DONE if error is None else failed,
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
    out = report.parent if report.name == "report.json" else str(report).removesuffix(".report.json")
    return Path(f"{Path(out).absolute()}.refused.report.json")
