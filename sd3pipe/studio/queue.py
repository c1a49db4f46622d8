"""The queue: one file for all projects of a user, read anew each time and replaced whole under a lock.

A job is a list of command lines that run one after the other. The worker (worker.py) does the jobs; whoever starts a
studio starts it again if it died.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from sd3pipe import stopping
from sd3pipe.child import ask_to_stop, start_detached
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import ExitCode, StorageError
from sd3pipe.files import lock_file, make_folder, write_json

State = Literal["waiting", "running", "done", "failed", "stopped"]
Kind = Literal["run", "draw", "judge", "check"]  # which page shows how it ended
Move = Literal["up", "down", "remove"]
_KEPT = 50  # jobs that have ended
_LOCK_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`mark` is that of the process at work (see living.py); `exit_code` is None where nobody saw it end."""

    id: str
    project: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    log: str
    kind: Kind = "run"
    state: State = "waiting"
    mark: str = ""
    at: int = 0  # which of its commands is at work
    stop_wanted: bool = False
    exit_code: int | None = None
    began: float | None = None
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "stopped")

    @property
    def folder(self) -> Path:
        return Path(self.project)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    format: Literal[1]
    jobs: tuple[Job, ...] = ()
    projects: tuple[str, ...] = ()  # folders that were opened, the latest last


_FILE = TypeAdapter(_File)


class Queue:
    """The jobs in their order. Every change is one short exchange of the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "queue.json"

    def jobs(self) -> tuple[Job, ...]:
        return self._read().jobs

    def projects(self) -> list[Path]:
        """Returns the folders of projects that were opened before."""
        return [Path(folder) for folder in self._read().projects]

    def note_project(self, folder: Path) -> None:
        """Remembers a project for the next start. Raises StorageError."""
        real = str(folder.resolve())
        self._change(lambda file: replace(file, projects=(*(p for p in file.projects if p != real), real)[-_KEPT:]))

    def add(
        self, project: Path, title: str, commands: Sequence[Sequence[str]], log_folder: Path, *, kind: Kind = "run"
    ) -> Job:
        """Puts a job at the end and sees to it that somebody works. Raises StorageError."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        log = make_folder(log_folder) / f"{name}.log"
        frozen = tuple(tuple(command) for command in commands)
        job = Job(id=name, project=str(project.resolve()), title=title, commands=frozen, log=str(log), kind=kind)
        self._change(lambda file: replace(file, jobs=_pruned((*file.jobs, job))))
        self.work()
        return job

    def update(self, job_id: str, edit: Callable[[Job], Job]) -> None:
        """Changes one job. Raises StorageError."""
        self._change(
            lambda file: replace(file, jobs=tuple(edit(job) if job.id == job_id else job for job in file.jobs))
        )

    def move(self, job_id: str, move: Move) -> None:
        """Moves a job among those that wait, or takes it out; one at work is not touched. Raises StorageError."""
        self._change(lambda file: replace(file, jobs=_moved(file.jobs, job_id, move)))

    def stop(self, job_id: str) -> None:
        """Asks the job at work to stop as Ctrl-C does, and again if asked again; one that waits does not begin.

        Raises StorageError.
        """

        def stopped(job: Job) -> Job:
            ended = {"state": "stopped", "ended": time.time()} if job.state == "waiting" else {}
            return replace(job, stop_wanted=True, **ended)

        self.update(job_id, stopped)
        for job in self.jobs():
            if job.id == job_id and job.mark:
                ask_to_stop(job.mark)

    def current(self, project: Path) -> Job | None:
        """Returns the job of a project that is at work, or else the one that waits first."""
        mine = [job for job in self.jobs() if job.project == str(project.resolve()) and not job.is_over]
        return next((job for job in mine if job.state == "running"), mine[0] if mine else None)

    def latest(self, project: Path, kind: Kind) -> Job | None:
        """Returns the job of that kind of a project that is at work, waits or ended last."""
        mine = [job for job in self.jobs() if job.project == str(project.resolve()) and job.kind == kind]
        return max(mine, key=lambda job: (job.state == "running", not job.is_over, job.ended or 0.0), default=None)

    def work(self) -> None:
        """Starts a worker where something is left to do; one that finds another at work ends at once."""
        if any(not job.is_over for job in self.jobs()):
            start_detached(["studio", "--queue-only"], folder=make_folder(self.folder), log=self.folder / "worker.log")

    def only_worker(self) -> contextlib.AbstractContextManager[bool]:
        """Yields whether this process may work: one does at a time."""
        return lock_file(self.folder / "worker.lock")

    def _read(self) -> _File:
        """Returns the file's content. Raises DocumentError for a damaged one, which nobody replaces."""
        try:
            return read_json(self._file, _FILE)
        except DocumentError as error:
            if not error.missing:
                raise
            return _File(format=1)

    def _change(self, edit: Callable[[_File], _File]) -> None:
        """Replaces the file by what is made of it, while nobody else does."""
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            with lock_file(self.folder / "queue.lock") as free:
                if free:
                    before = self._read()
                    after = edit(before)
                    if after != before:
                        write_json(self._file, asdict(after))
                    return
            if time.monotonic() > until:
                raise StorageError(f"{self._file}: another process keeps it: end it, then try again")
            time.sleep(0.02)


def state_of(exit_code: int) -> State:
    """Returns how a command ended that returned an exit code, or minus the signal that ended it."""
    if exit_code == ExitCode.STOPPED or -exit_code in stopping.SIGNALS:
        return "stopped"
    return "done" if exit_code == ExitCode.DONE else "failed"


def queue_folder() -> Path:
    """Returns where the queue lies: with what programs of this user remember."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sd3pipe"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sd3pipe"


def _pruned(jobs: Sequence[Job]) -> tuple[Job, ...]:
    ended = [job.id for job in jobs if job.is_over]
    old = set(ended[: max(0, len(ended) - _KEPT)])
    return tuple(job for job in jobs if job.id not in old)


def _moved(jobs: Sequence[Job], job_id: str, move: Move) -> tuple[Job, ...]:
    order = list(jobs)
    at = next((number for number, job in enumerate(order) if job.id == job_id), None)
    if at is None or order[at].state == "running":
        return tuple(jobs)
    job = order.pop(at)
    if move == "remove":
        return tuple(order)
    waiting = [number for number, other in enumerate(order) if other.state == "waiting"]
    if job.state != "waiting" or not waiting:
        return tuple(jobs)
    before = [number for number in waiting if number < at]
    after = [number for number in waiting if number >= at]
    place = max(before, default=at) if move == "up" else min(after, default=at - 1) + 1
    order.insert(place, job)
    return tuple(order)
