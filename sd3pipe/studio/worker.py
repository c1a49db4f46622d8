"""Works off the queue, one job after another, in a process that needs no studio and outlives it."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

from sd3pipe import stopping
from sd3pipe.child import start_detached
from sd3pipe.errors import ExitCode, Sd3pipeError
from sd3pipe.living import is_alive
from sd3pipe.studio.queue import Job, Queue, state_of

_POLL_SECONDS = 0.5  # for the end of a job that an earlier worker had started


def work_off(queue: Queue) -> None:
    """Does what waits until nothing does; a job that fails is passed over. Ends at once where another works.

    Raises Stopped when asked to stop; the job at work goes on, and the next worker waits for it.
    """
    with queue.only_worker() as free:
        while free and (jobs := [job for job in queue.jobs() if not job.is_over]):
            job = next((job for job in jobs if job.state == "running"), jobs[0])
            # An earlier worker had started that one, and nobody saw how it ended. So its command is given once more,
            # which goes on from there, or finds nothing to do.
            while job.mark and is_alive(job.mark):
                with stopping.breaking_off():
                    time.sleep(_POLL_SECONDS)
            _do(queue, job)


def _do(queue: Queue, job: Job) -> None:
    """Runs the commands of a job, from the one that was at work, until one fails or the job is to stop."""
    began = job.began or time.time()
    queue.update(job.id, lambda job: replace(job, state="running", began=began))
    code: int = ExitCode.DONE
    for number, command in list(enumerate(job.commands))[job.at :]:
        if any(other.id == job.id and other.stop_wanted for other in queue.jobs()):
            code = ExitCode.STOPPED
        elif code == ExitCode.DONE:
            code = _run(queue, job, number, _again(command) if number == job.at and job.mark else list(command))
    state = state_of(code)
    queue.update(job.id, lambda job: replace(job, state=state, exit_code=code, ended=time.time(), mark=""))


def _run(queue: Queue, job: Job, number: int, command: list[str]) -> int:
    try:
        child = start_detached(command, folder=job.folder, log=Path(job.log))
    except (OSError, Sd3pipeError):  # the folder is gone, or the disk is full
        return ExitCode.INPUT
    queue.update(job.id, lambda job: replace(job, mark=child.mark, at=number))
    with stopping.breaking_off():
        return child.process.wait()


def _again(command: tuple[str, ...]) -> list[str]:
    """Returns a command that was under way, so that it goes on: what began afresh does not begin afresh again."""
    pairs = itertools.pairwise(("", *command))
    return ["auto" if before == "--resume" and word == "never" else word for before, word in pairs]
