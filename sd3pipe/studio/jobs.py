"""The command lines of what a person starts here; they are those that he would type."""

from pathlib import Path

from sd3pipe.config import Project
from sd3pipe.stages import stages_of
from sd3pipe.studio.places import path_of, studio_folder
from sd3pipe.studio.queue import Job, Queue

HOW = {
    "old": "with the old rows: what changed is not learnt",
    "new": "with the new rows: what changed is encoded, and learnt from here on",
    "afresh": "afresh: from step 0; the run so far is set aside as it is",
}
_BEFORE_TRAINING = ("caption", "encode-text", "encode-prompts", "encode-latents")
# what a run's identity says of its rows; the other parts may not differ
_ROWS = "training_rows"


def start_run(project: Project, queue: Queue, *, how: str, goes_on: bool) -> Job:
    """Puts a run into the queue: from the beginning, or from its newest checkpoint, as `how` of `HOW` says.

    Whoever goes on names the run to go on from, so that train refuses what differs instead of beginning afresh.
    """
    run = str(path_of(project, "run").absolute())
    encode = ["run", *(stage.name for stage in stages_of(project.paths) if stage.name in _BEFORE_TRAINING)]
    if not goes_on:
        commands = [["run"]]
    elif how == "afresh":
        commands = [encode, ["train", "--resume", "never"], ["run", "export"]]
    elif how == "old":
        commands = [["train", "--resume", run, "--stale-ok"], ["run", "export"]]
    else:
        allowed = ["--allow-changes", _ROWS] if how == "new" else []
        commands = [encode, ["train", "--resume", run, *allowed], ["run", "export"]]
    title = f"go on, {HOW[how].partition(':')[0]}" if how else "go on" if goes_on else "run"
    return _add(queue, project, title, commands)


def draw_missing(project: Project, queue: Queue, *, run: Path, out: Path, checkpoints: str, strengths: str) -> Job:
    """Puts a sample job into the queue: each checkpoint at each strength, beside the base."""
    command = ["sample", "--adapter", str(run.absolute()), "--out", str(out.absolute()), "--checkpoints", checkpoints]
    return _add(queue, project, "draw what is missing", [[*command, "--multiplier", strengths]])


def _add(queue: Queue, project: Project, title: str, commands: list[list[str]]) -> Job:
    return queue.add(project.folder, title, commands, studio_folder(project).absolute() / "logs")
