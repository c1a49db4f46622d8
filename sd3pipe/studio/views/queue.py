"""Queue: the jobs of all projects in their order."""

from dataclasses import replace
from typing import Any, get_args

from sd3pipe.errors import ParameterError
from sd3pipe.studio.app import Ask
from sd3pipe.studio.queue import Kind, Move
from sd3pipe.studio.status import how_it_went

_PAGES: dict[Kind, str] = {"run": "train", "draw": "compare", "judge": "compare", "check": "pictures"}
_MOVES: tuple[Move, ...] = get_args(Move)


def page(ask: Ask) -> str:
    jobs = [(job, how_it_went(job)) for job in ask.studio.queue.jobs()]
    order = {"running": 0, "waiting": 1}
    shown = sorted(jobs, key=lambda item: order.get(item[0].state, 2))  # a stable sort: the waiting keep their order
    ended = [item for item in shown if item[0].is_over][::-1]
    slugs = {project["folder"]: project["slug"] for project in ask.studio.projects.listed()}
    return ask.page(
        "jobs" if ask.query.get("part") == "jobs" else "queue",
        title="Queue",
        jobs=[*(item for item in shown if not item[0].is_over), *ended],
        addresses={job.id: f"/p/{slugs[job.project]}/{_PAGES[job.kind]}" for job, _ in jobs if job.project in slugs},
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
