"""What there is to compare: the run's samples by step, a sheet of checkpoints at strengths, judge's scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3pipe.diffusion.sheet import SHEET_FILE, read_sheet
from sd3pipe.errors import InputError
from sd3pipe.judgement import JUDGE_FILE, JUDGE_FOLDER, SCORES, Score, Scores, read_judgement
from sd3pipe.studio.runs import RunView

SHEET_FOLDER = "compare"  # in the run, so that it goes aside with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Rows of a title and a picture per column, as a path in the run; None where it is not drawn."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]


def step_matrix(run: RunView) -> Matrix | None:
    """Returns the samples that were drawn while the run trained: step 0 is the base."""
    found = run.samples()
    if not found["steps"]:
        return None
    columns = tuple("base" if step == 0 else f"step {step}" for step in found["steps"])
    rows = tuple(
        (prompt["title"], tuple(prompt["pictures"].get(str(step)) for step in found["steps"]))
        for prompt in found["prompts"]
    )
    return Matrix(title="While it trained", columns=columns, rows=rows)


def sheet_matrix(run: RunView) -> Matrix | None:
    """Returns what a sample job drew for this page: base first, then checkpoints at strengths, at equal seeds."""
    out = run.place / SHEET_FOLDER
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
    return Matrix(title="Checkpoints and strengths", columns=sheet.columns, rows=rows)


def judged(run: RunView) -> Mapping[str, Any] | None:
    """Returns judge's scores as rows, and its suggestion; None where nothing was judged."""
    folder = run.place / JUDGE_FOLDER
    if not (folder / JUDGE_FILE).is_file():
        return None
    try:
        found = read_judgement(folder)
    except InputError as error:
        return {"heads": (), "rows": (), "text": str(error)}
    rows = [[_column(scores), *(_shown(getattr(scores, name)) for name in SCORES)] for scores in found.scores]
    return {"heads": ["checkpoint", *SCORES], "rows": rows, "text": found.suggestion.text}


def _column(scores: Scores) -> str:
    return f"{'step ' if isinstance(scores.checkpoint, int) else ''}{scores.checkpoint} x {scores.multiplier:g}"


def _shown(score: Score | None) -> str:
    if score is None:
        return ""
    is_known = score.low is not None and score.high is not None
    return f"{score.value:.3g}" + (f" ({score.low:.3g} to {score.high:.3g})" if is_known else "")
