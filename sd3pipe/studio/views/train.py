"""Train: start, stop and go on, and what the run shows while it goes."""

import mimetypes
import re
from typing import Any

from starlette.responses import Response

from sd3pipe.cache.staleness import check_sources
from sd3pipe.child import ask_to_stop
from sd3pipe.config import Project
from sd3pipe.console import count
from sd3pipe.errors import ExitCode, InputError, ParameterError, UnreadablePicture
from sd3pipe.reporting.collect import read_picture_of
from sd3pipe.stages import stages_of
from sd3pipe.studio.app import Ask
from sd3pipe.studio.places import path_of
from sd3pipe.studio.queue import Job
from sd3pipe.studio.runs import MOST_POINTS, RunView, run_names, run_place
from sd3pipe.studio.status import at_work, log_lines, status

HOW = {
    "old": "with the old rows: what changed is not learnt",
    "new": "with the new rows: what changed is encoded, and learnt from here on",
    "differing": "all the same: what differs holds from here on",
    "afresh": "afresh: from step 0; the run so far is set aside as it is",
}
_BEFORE_TRAINING = ("caption", "encode-text", "encode-prompts", "encode-latents")
_REFUSED = re.compile(r"go on all the same with --allow-changes (\S+)$")
_ROWS = "training_rows"  # what a run's identity says of its rows; other parts may differ once train named them


def page(ask: Ask) -> str:
    run = _run(ask)
    names = run_names(ask.project)
    now = status(ask.project, ask.studio.queue, run)
    job = ask.studio.queue.latest(ask.project.folder, "run")
    return ask.page(
        "train",
        title="Train",
        status=now,
        run=run.place.name,
        runs=names,
        is_own=run.place.name == names[0],
        has_checkpoints=bool(run.checkpoints()),
        is_finished=run.is_finished(),
        changed=_changed(ask),
        count=count,
        how=_ways(job),
        log=now.log,
        is_stale=now.exit_code == ExitCode.STALE and bool(run.checkpoints()),
    )


def curves(ask: Ask) -> dict[str, Any]:
    found = _run(ask).curves
    return {
        "mark": found.mark,
        "rows": len(found),
        "points": found.points(most=MOST_POINTS),
        "validations": found.validations,
    }


def start(ask: Ask) -> dict[str, Any]:
    """Starts the run, or goes on with it; if what it was made from changed, asks first how."""
    how = ask.text("how")
    if how and how not in HOW:
        raise ParameterError(f"how: one of {', '.join(HOW)}")
    if at_work(ask.project) or ask.studio.queue.current(ask.project.folder):
        raise InputError("this project has a job already: wait for it, or take it out of the queue")
    goes_on, changed = bool(RunView(run_place(ask.project)).checkpoints()), _changed(ask)
    last = ask.studio.queue.latest(ask.project.folder, "run")
    if goes_on and changed and not how:
        html = ask.page("go_on", changed=changed, how=_ways(last))
        return {"html": html, "message": "captions or pictures changed: say how to go on"}
    title = f"go on, {HOW[how].partition(':')[0]}" if how else "go on" if goes_on else "run"
    commands = _commands(ask.project, how=how, goes_on=goes_on, differing=_differing(last))
    ask.queue("run", title, *commands)
    return {"reload": True}


def _ways(job: Job | None) -> dict[str, str]:
    """Returns how one may go on after a job."""
    return {name: words for name, words in HOW.items() if name != "differing" or _differing(job)}


def _differing(job: Job | None) -> str:
    """Returns what train named as different when it refused to go on, "" where it did not."""
    lines = log_lines(job) if job is not None and job.exit_code == ExitCode.STALE else []
    return next((found[1] for line in reversed(lines) if (found := _REFUSED.search(line))), "")


def _commands(project: Project, *, how: str, goes_on: bool, differing: str) -> list[list[str]]:
    """Returns what runs: from the beginning, or from the newest checkpoint, as `how` of `HOW` says.

    Whoever goes on names the run to go on from, so that train refuses what differs instead of beginning afresh.
    """
    run = str(path_of(project, "run").absolute())
    encode = ["run", *(stage.name for stage in stages_of(project.paths) if stage.name in _BEFORE_TRAINING)]
    if not goes_on:
        return [["run"]]
    if how == "afresh":
        return [encode, ["train", "--resume", "never"], ["run", "export"]]
    if how == "old":
        return [["train", "--resume", run, "--stale-ok"], ["run", "export"]]
    names = {"new": _ROWS, "differing": differing}.get(how)
    allowed = ["--allow-changes", names] if names else []
    return [encode, ["train", "--resume", run, *allowed], ["run", "export"]]


def stop(ask: Ask) -> dict[str, Any]:
    """Asks what is at work to stop after the step under way, also what was started at a terminal."""
    job, now = ask.studio.queue.current(ask.project.folder), at_work(ask.project)
    if job is not None and (job.state == "running" or now is None):
        ask.studio.queue.stop(job.id)
        if job.state == "waiting":
            return {"message": "taken out of the queue", "reload": True}
        return {"message": "stopping after what is under way; everything is saved"}
    if now is None or not ask_to_stop(now.mark):
        raise InputError("nothing is at work here")
    return {"message": "stopping what was started at a terminal, after what is under way"}


def sample(ask: Ask) -> Response:
    """Returns a picture of a run, which lies in it, behind links, too."""
    run = _run(ask).folder
    try:
        kind, data, _ = read_picture_of(run / ask.path["path"], run)
    except UnreadablePicture as error:
        raise InputError(f"{ask.path['path']}: is not shown: {error}") from error
    return Response(data, media_type=mimetypes.types_map[f".{kind}"], headers={"cache-control": "private, max-age=60"})


def _run(ask: Ask) -> RunView:
    run = ask.studio.watches.of(ask.project, ask.query.get("run", "")).run
    run.read()
    return run


def _changed(ask: Ask) -> list[str]:
    """Returns what changed since it was encoded."""
    caches = path_of(ask.project, "caches")
    return [change for name in ("text", "latents") for change in check_sources(caches / name).changes]
