"""What is at work in a project, told by the marks that its processes leave, whoever started them."""

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sd3pipe.cache.folder import CacheFolder, machine_folder
from sd3pipe.child import GOES_ON
from sd3pipe.config import Project
from sd3pipe.console import readable_bytes, readable_seconds
from sd3pipe.documents import DocumentError, read_data, read_text
from sd3pipe.errors import ExitCode, InputError, ParameterError
from sd3pipe.files import lock_holder
from sd3pipe.living import living_pid
from sd3pipe.params.train import TrainParams
from sd3pipe.project.inputs import stage_options
from sd3pipe.stages import STAGES_BY_NAME
from sd3pipe.studio.places import path_of
from sd3pipe.studio.queue import Job, Queue, state_of
from sd3pipe.studio.runs import Curves, RunView

_CACHES = {"text": "encode-text", "prompts": "encode-prompts", "latents": "encode-latents"}
_PROGRESS = re.compile(r"^(?P<what>[\w -]+): (?P<done>\d+)/(?P<total>\d+) (?P<rest>.*)$")
_MEMORY = re.compile(r"memory ([\d.]+ [KMGT]?B)")
_RSS = re.compile(rb"VmRSS:\s+(\d+) kB")
_WAYS_OUT = {
    ExitCode.BUG: "This is a bug in sd3pipe: the line above names a file to report.",
    ExitCode.PARAMETERS: "Mend what the lines name, on the Plan page or in the file, then go on.",
    ExitCode.INPUT: "Repair or replace what the line names, then go on.",
    ExitCode.STALE: "What the run was made from is another by now: choose below how to go on.",
    ExitCode.QUARANTINE: "Repair or remove the named pictures, then go on; the good ones are in the cache.",
    ExitCode.NETWORK: "Accept the licence on the page that the line names and log in, or name local files.",
    ExitCode.STORAGE: "Free space or wait for the other process, then go on.",
    ExitCode.MEMORY: "The line names settings that fit: set them on the Plan page, then go on.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """A stage at work, and the mark of its process."""

    stage: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a page says of it; `state` is idle, waiting, working, done, failed or stopped."""

    state: str
    stage: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    share: float | None = None  # how much of the stage is done, in per cent
    errors: tuple[str, ...] = ()
    way_out: str = ""
    from_terminal: bool = False
    exit_code: int | None = None  # where it failed
    log: str = ""


def at_work(project: Project) -> AtWork | None:
    """Returns the stage that writes into the project's caches or run, if one does on this machine."""
    run = path_of(project, "run")
    if mark := lock_holder(machine_folder(run).parent / f"{run.resolve().name}.lock"):
        return AtWork(stage="train", mark=mark)
    for name, stage in _CACHES.items():
        writers = CacheFolder(path_of(project, "caches") / name).writers
        for entry in writers.iterdir() if writers.is_dir() else ():
            if living_pid(entry.name) is not None:
                return AtWork(stage=stage, mark=entry.name)
    return None


def status(project: Project, queue: Queue, run: RunView) -> Status:
    """Returns what is said of a run: whatever is at work in its project, or else how the run itself rests."""
    job, now = queue.current(project.folder) or queue.latest(project.folder, "run"), at_work(project)
    is_ours, curves = job is not None and job.state == "running", run.curves
    if now is None and not is_ours:
        facts = (("steps", f"{curves.step:,}"),) if curves.step else ()
        return replace(_resting(job, run), facts=facts)
    lines = log_lines(job) if job and is_ours else []
    starts = [number for number, line in enumerate(lines) if line.startswith("$ sd3pipe ")]
    begun = lines[starts[-1] :] if starts else []  # from where `run` began the stage that came last
    words = begun[0].split()[2:] if begun else ["starting"]
    if job and is_ours and job.commands[job.at][0] != "run":
        words = list(job.commands[job.at])
    stage = now.stage if now else "encode-prompts" if "--sample-prompts" in words else words[0]
    progress = next((match for line in reversed(begun or lines) if (match := _PROGRESS.match(line))), None)
    share, facts = _progress(project, stage, curves, progress)
    if now and (memory := _resident_bytes(now.mark)):
        facts.append(("host memory", readable_bytes(memory)))
    if progress and (device := _MEMORY.search(progress["rest"])):
        facts.append(("most memory", device[1]))
    return Status(
        state="working",
        stage=stage,
        facts=tuple(facts),
        share=share,
        from_terminal=not is_ours,
        log="\n".join(lines),
    )


def _progress(
    project: Project, stage: str, curves: Curves, progress: re.Match[str] | None
) -> tuple[float | None, list[tuple[str, str]]]:
    """Returns how much of a stage is done, in per cent, and what is said of its pace."""
    total = _total_steps(project) if stage == "train" else None
    share, facts = None, []
    if total:
        share = min(100.0, 100 * curves.step / total)
        facts.append(("step", f"{curves.step:,} of {total:,}"))
    elif progress and int(progress["total"]):
        share = 100 * int(progress["done"]) / int(progress["total"])
        facts.append((progress["what"], f"{progress['done']} of {progress['total']} {progress['rest']}"))
    if stage == "train" and (pace := curves.seconds_per_step):
        facts.append(("pace", f"{pace:.3g} s/it" if pace >= 0.1 else f"{1 / pace:.3g} it/s"))
        if total:
            facts.append(("left", readable_seconds(max(0, total - curves.step) * pace)))
    return share, facts


def how_it_went(job: Job) -> str:
    """Returns what is to be said of a job in a line."""
    if job.state == "failed":
        errors = _errors(log_lines(job))
        return errors[-1] if errors else f"ended with exit code {job.exit_code}"
    if job.began is None:
        return ""
    return readable_seconds((job.ended or time.time()) - job.began)


def _resting(job: Job | None, run: RunView) -> Status:
    """Returns how what came last ended: the job, or a train at a terminal, of which the run's report tells."""
    end = run.end()
    if end and (job is None or (job.ended is not None and end.at > job.ended)):
        return _ended(state_of(end.exit_code), "train, at a terminal", end.exit_code, (end.error,))
    if job is None:
        return Status(state="idle")
    lines = log_lines(job)
    return replace(_ended(job.state, job.title, job.exit_code, _errors(lines)), log="\n".join(lines))


def _ended(state: str, title: str, exit_code: int | None, errors: tuple[str, ...]) -> Status:
    if state != "failed":
        return Status(state=state, stage=title)
    code = exit_code if exit_code is not None else ExitCode.BUG
    killed = () if code >= 0 else (f"its process was ended by signal {-code}",)
    way_out = _WAYS_OUT.get(ExitCode(code), "") if code in set(ExitCode) else "Go on: nothing that was saved is lost."
    return Status(state=state, stage=title, errors=errors[-8:] or killed, way_out=way_out, exit_code=code)


def _errors(lines: list[str]) -> tuple[str, ...]:
    """Returns what a log has of errors: of a stage's own, where there are any, not that `run` ended with it."""
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return tuple([line for line in found if not line.endswith(GOES_ON)] or found)


def log_lines(job: Job) -> list[str]:
    """Returns the last lines of a job's log."""
    try:
        return read_text(Path(job.log)).split("\n")[-400:]
    except DocumentError as error:
        return [] if error.missing else [str(error)]


def _total_steps(project: Project) -> int | None:
    try:
        options = stage_options(project, STAGES_BY_NAME["train"])
    except (ParameterError, InputError):
        return None
    assert isinstance(options, TrainParams)
    return None if options.batches.max_train_epochs else options.batches.max_train_steps


def _resident_bytes(mark: str) -> int | None:
    """Returns how much host memory a process has now, where the kernel says so."""
    try:
        found = _RSS.search(read_data(Path(f"/proc/{living_pid(mark)}/status")))
    except DocumentError:
        return None
    return int(found[1]) * 1024 if found else None
