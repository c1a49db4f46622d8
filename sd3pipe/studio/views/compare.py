"""Compare: prompts by checkpoints and strengths, training pictures beside them, and "use this one"."""

import re
from pathlib import Path
from typing import Any, get_args

from sd3pipe.child import run_captured
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.params.export import ExportParams
from sd3pipe.params.sample import SampleParams
from sd3pipe.studio.app import Ask
from sd3pipe.studio.compare import SHEET_FOLDER, judged, sheet_matrix, step_matrix
from sd3pipe.studio.gallery import read_gallery
from sd3pipe.studio.jobs import draw_missing
from sd3pipe.studio.places import path_of
from sd3pipe.studio.runs import RunView, run_place

_REFERENCES = 8
_STRENGTH = re.compile(r"-?\d+(\.\d+)?")
_FORMATS = get_args(ExportParams.model_fields["format"].annotation)


def page(ask: Ask) -> str:
    run = RunView(run_place(ask.project, ask.query.get("run", "")))
    try:
        references = read_gallery(ask.project, may_write=not ask.studio.access.read_only).entries[:_REFERENCES]
    except (InputError, ParameterError):  # a machine that only trains has no pictures
        references = []
    return ask.page(
        "compare",
        title="Compare",
        run=run.place.name,
        matrices=[matrix for matrix in (sheet_matrix(run), step_matrix(run)) if matrix],
        judged=judged(run),
        references=references,
        checkpoints=list(run.checkpoints()),
        is_finished=run.is_finished(),
        formats=_FORMATS,
        strengths="0.6,0.8,1",
    )


def draw(ask: Ask) -> dict[str, Any]:
    """Puts a sample job into the queue."""
    run = run_place(ask.project)
    checkpoints, strengths = ask.text("checkpoints") or "all", ask.text("strengths") or "1"
    for name, value in (("checkpoints", checkpoints), ("multiplier", strengths)):
        pattern = next(item.pattern for item in SampleParams.model_fields[name].metadata if hasattr(item, "pattern"))
        if not re.fullmatch(pattern, value):
            raise ParameterError(f"{name} = {value}: {SampleParams.model_fields[name].description}")
    out = run / SHEET_FOLDER
    draw_missing(ask.project, ask.studio.queue, run=run, out=out, checkpoints=checkpoints, strengths=strengths)
    return {"message": "in the queue: what is missing is drawn", "location": "/queue"}


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
    _export(ask, adapters[chosen].absolute(), form, strength, out)
    return {"html": ask.page("exported", file=str(out)), "message": f"written: {out.name}"}


def _export(ask: Ask, adapter: Path, form: str, strength: str, out: Path) -> None:
    words = ["export", "--adapter", str(adapter), "--format", form, f"--multiplier={strength}", "--out", str(out)]
    code, printed = run_captured(words, folder=ask.project.folder)
    if code:
        errors = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
        raise InputError("\n".join(errors or printed.splitlines()[-3:]))
