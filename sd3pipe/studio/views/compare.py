"""Compare: prompts by checkpoints and strengths, training pictures beside them, and "use this one"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sd3pipe.config import Project
from sd3pipe.diffusion.sheet import SHEET_FILE, read_sheet
from sd3pipe.errors import InputError, ParameterError, Sd3pipeError
from sd3pipe.judgement import JUDGE_FILE, SCORES, Score, read_judgement
from sd3pipe.metrics import METRICS_FILE
from sd3pipe.params.export import ExportParams
from sd3pipe.params.sample import SampleParams
from sd3pipe.studio.app import Ask
from sd3pipe.studio.gallery import read_gallery
from sd3pipe.studio.places import judge_folder, path_of
from sd3pipe.studio.queue import Job, Kind
from sd3pipe.studio.runs import RunView, run_place
from sd3pipe.studio.status import how_it_went

_SHEET_FOLDER = "compare"  # in the run, so that it goes aside with it
_REFERENCES = 8
_STRENGTH = re.compile(r"-?\d+(\.\d+)?")
_MODEL = "--judge-model="
_JOBS: tuple[Kind, ...] = ("draw", "judge")  # which this page starts
_FORMATS = get_args(ExportParams.model_fields["format"].annotation)


def page(ask: Ask) -> str:
    run = RunView(run_place(ask.project, ask.query.get("run", "")))
    try:
        references = read_gallery(ask.project, may_write=not ask.studio.access.read_only).entries[:_REFERENCES]
    except Sd3pipeError:  # a machine that only trains has no pictures
        references = []
    jobs = {kind: ask.studio.queue.latest(ask.project.folder, kind) for kind in _JOBS}
    return ask.page(
        "compare",
        title="Compare",
        run=run.place.name,
        matrices=[matrix for matrix in (_sheet_matrix(run), _step_matrix(run)) if matrix],
        judged=_judged(judge_folder(ask.project, run.place)),
        references=references,
        checkpoints=list(run.checkpoints()),
        is_finished=run.is_finished(),
        has_record=(run.folder / METRICS_FILE).is_file(),
        formats=_FORMATS,
        strengths="0.6,0.8,1",
        judge_model=_judge_model(ask.project, jobs["judge"]),
        jobs=jobs,
        how_it_went=how_it_went,
    )


def draw(ask: Ask) -> dict[str, Any]:
    """Puts a sample job into the queue."""
    run = run_place(ask.project)
    checkpoints, strengths = ask.text("checkpoints") or "all", ask.text("strengths") or "1"
    for name, value in (("checkpoints", checkpoints), ("multiplier", strengths)):
        pattern = next(item.pattern for item in SampleParams.model_fields[name].metadata if hasattr(item, "pattern"))
        if not re.fullmatch(pattern, value):
            raise ParameterError(f"{name} = {value}: {SampleParams.model_fields[name].description}")
    command = ["sample", "--adapter", str(run.absolute()), "--out", str((run / _SHEET_FOLDER).absolute())]
    command += ["--checkpoints", checkpoints, "--multiplier", strengths]
    return ask.queue("draw", "draw what is missing", command)


def judge(ask: Ask) -> dict[str, Any]:
    """Puts a judgement of the run into the queue; it is written where this page and `export` look for it."""
    model = ask.text("judge_model")
    if not model:
        raise ParameterError("judge_model: name a folder or a hub id, such as openai/clip-vit-large-patch14")
    out = judge_folder(ask.project, run_place(ask.project)).absolute()
    return ask.queue("judge", "judge", ["judge", f"{_MODEL}{model}", "--out", str(out)])


def use(ask: Ask) -> dict[str, Any]:
    """Exports a checkpoint, or the finished adapter, in a form and at a strength, and says where the file is."""
    run, chosen, form = RunView(run_place(ask.project)), ask.text("checkpoint"), ask.text("format")
    if form not in _FORMATS:
        raise ParameterError(f"format: one of {', '.join(_FORMATS)}")
    adapters = {str(step): path for step, path in run.checkpoints().items()}
    adapters["final"] = run.place / "final" / "adapter.safetensors"
    if chosen not in adapters or not adapters[chosen].is_file():
        raise ParameterError(f"checkpoint = {chosen}: the run has {', '.join(adapters)}")
    strength = ask.text("strength") or "1"
    if not _STRENGTH.fullmatch(strength):
        raise ParameterError(f"strength = {strength}: write a number, such as 0.8")
    export = path_of(ask.project, "export").absolute()
    step = "" if chosen == "final" else f"-step{int(chosen):08d}"
    marked = ("" if float(strength) == 1 else f"-x{float(strength):g}") + ("" if form == "comfyui" else f"-{form}")
    ending = "" if form == "hub" else ".safetensors"  # a hub takes a folder
    out = export.with_name(f"{export.stem}{step}{marked}{ending}")
    words = ["export", "--adapter", str(adapters[chosen].absolute()), "--format", form, f"--multiplier={strength}"]
    ask.run([*words, "--out", str(out)], ask.project.folder)
    return {"html": ask.page("exported", file=str(out)), "message": f"written: {out.name}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """Rows of a title and a picture per column, as a path in the run; None where it is not drawn."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]


def _step_matrix(run: RunView) -> _Matrix | None:
    """Returns the samples that were drawn while the run trained: step 0 is the base."""
    found = run.samples()
    if not found["steps"]:
        return None
    columns = tuple("base" if step == 0 else f"step {step}" for step in found["steps"])
    rows = tuple(
        (prompt["title"], tuple(prompt["pictures"].get(str(step)) for step in found["steps"]))
        for prompt in found["prompts"]
    )
    return _Matrix(title="While it trained", columns=columns, rows=rows)


def _sheet_matrix(run: RunView) -> _Matrix | None:
    """Returns what a sample job drew for this page: base first, then checkpoints at strengths, at equal seeds."""
    out = run.place / _SHEET_FOLDER
    if not (out / SHEET_FILE).is_file():
        return None
    try:
        sheet = read_sheet(out)
    except InputError:
        return None
    drawn = {path.name.rpartition("-vae")[0]: path for path in (out / "pictures").glob("*.png")}
    rows = tuple(
        (
            f"{prompt.title}, {seed}",
            tuple(drawn[cell].relative_to(run.place).as_posix() if cell in drawn else None for cell in cells),
        )
        for prompt in sheet.prompts
        for seed, cells in zip(prompt.rows, prompt.cells, strict=True)
    )
    return _Matrix(title="Checkpoints and strengths", columns=sheet.columns, rows=rows)


def _judge_model(project: Project, job: Job | None) -> str:
    """Returns what was asked for last, or what the project names."""
    words = job.commands[0] if job else ()
    asked = (word.removeprefix(_MODEL) for word in words if word.startswith(_MODEL))
    return next(asked, project.paths.get("judge_model", ""))


def _judged(folder: Path) -> Mapping[str, Any] | None:
    """Returns judge's scores as rows, and its suggestion; None where nothing was judged."""
    if not (folder / JUDGE_FILE).is_file():
        return None
    try:
        found = read_judgement(folder)
    except InputError as error:
        return {"heads": (), "rows": (), "text": str(error)}
    rows: list[list[str]] = []
    for item in found.scores:
        title = f"{'step ' if isinstance(item.checkpoint, int) else ''}{item.checkpoint} x {item.multiplier:g}"
        scores: list[Score | None] = [getattr(item, name) for name in SCORES]
        rows.append([title, *(score.shown(".3g") if score else "" for score in scores)])
    return {"heads": ["checkpoint", *SCORES], "rows": rows, "text": found.suggestion.text}
