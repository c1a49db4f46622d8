"""Queue: the jobs of all projects in their order."""

import time
from dataclasses import replace
from typing import Any, get_args

from sd3pipe.console import readable_seconds
from sd3pipe.errors import ParameterError
from sd3pipe.studio.app import Ask
from sd3pipe.studio.queue import Job, Move
from sd3pipe.studio.status import log_lines

_MOVES: tuple[Move, ...] = get_args(Move)


def page(ask: Ask) -> str:
    jobs = [(job, _how(job)) for job in ask.studio.queue.jobs()]
    order = {"running": 0, "waiting": 1}
    shown = sorted(jobs, key=lambda item: order.get(item[0].state, 2))  # a stable sort: the waiting keep their order
    ended = [item for item in shown if item[0].is_over][::-1]
    return ask.page(
        "jobs" if ask.query.get("part") == "jobs" else "queue",
        title="Queue",
        jobs=[*(item for item in shown if not item[0].is_over), *ended],
    )


def change(ask: Ask) -> dict[str, Any]:
    """Moves, removes or stops a job."""
    job, move = ask.text("job"), ask.text("move")
    if move == "stop":
        ask.studio.queue.stop(job)
    elif move in _MOVES:
        ask.studio.queue.move(job, move)
    else:
        raise ParameterError(f"move: one of {', '.join(_MOVES)}, stop")
    return {"html": page(replace(ask, query={"part": "jobs"}))}


def _how(job: Job) -> str:
    """Returns what is to be said of a job in a line."""
    if job.state == "failed":
        errors = [line for line in log_lines(job) if line.startswith("error: ")]
        return errors[-1] if errors else f"ended with exit code {job.exit_code}"
    if job.began is None:
        return ""
    return readable_seconds((job.ended or time.time()) - job.began)
