"""What pages show of a judgement: the suggestion, a table, a curve of each score over the steps, a scatter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3pipe.documents import DocumentError, read_data
from sd3pipe.judgement import SCORES, Judgement, Score, Scores
from sd3pipe.pages.charts import COLOURS, Chart, Series, line_chart
from sd3pipe.pages.render import data_url

_TITLES = {
    "likeness": "likeness: from the base's pictures, 0, to the training pictures, 1",
    "copying": "copying: nearer to single training pictures",
    "prompt": "prompt: nearer to the prompt's words",
    "drift": "drift: prompts without the trigger, away from the base's pictures",
    "variety": "variety: further apart over seeds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A checkpoint in the scatter; `picture` is shown while one points at it."""

    x: float
    y: float
    look: str
    name: str
    picture: str


def judgement_facts(found: Judgement | None, folder: Path) -> dict[str, Any] | None:
    """Returns what the macro `judgement` draws; `folder` has the thumbnails. None for none."""
    if found is None:
        return None
    pictures = [[_thumbnail(folder, name) for name in drawn.pictures] for drawn in found.drawn]
    return {
        "text": found.suggestion.text,
        "remarks": found.remarks,
        "heads": ["", *SCORES, ""],
        "rows": [_row(scores) for scores in found.scores],
        "curves": [(title, _curve(found.scores, name, found.limits.get(name))) for name, title in _TITLES.items()],
        "scatter": _scatter(found, pictures),
        "columns": ["base", *map(_name, found.scores)],
        "drawn": [(drawn.prompt, row) for drawn, row in zip(found.drawn, pictures, strict=True)],
    }


def _name(scores: Scores) -> str:
    step = f"step {scores.checkpoint}" if isinstance(scores.checkpoint, int) else scores.checkpoint
    return step if scores.multiplier == 1 else f"{step} x {scores.multiplier:g}"


def _row(scores: Scores) -> list[str]:
    said = [word for word, holds in (("close to a training picture", scores.close), ("drifts", scores.drifts)) if holds]
    found: list[Score | None] = [getattr(scores, name) for name in SCORES]
    return [_name(scores), *(score.shown("+.3f") if score else "" for score in found), ", ".join(said)]


def _curve(scores: Sequence[Scores], name: str, limit: float | None) -> Chart | None:
    """Returns one line over the steps for each strength, with its interval."""
    lines = []
    for number, multiplier in enumerate(dict.fromkeys(item.multiplier for item in scores)):
        mine = [
            (item.checkpoint, score)
            for item in scores
            if item.multiplier == multiplier
            and isinstance(item.checkpoint, int)
            and (score := getattr(item, name)) is not None
        ]
        if len(mine) > 1:
            lines.append(
                Series(
                    name=f"strength {multiplier:g}, 95 % interval",
                    look=f"c{number % COLOURS}",
                    x=[step for step, _ in mine],
                    y=[score.value for _, score in mine],
                    low=[score.value if score.low is None else score.low for _, score in mine],
                    high=[score.value if score.high is None else score.high for _, score in mine],
                )
            )
    if lines and limit is not None:
        sign = 1 if name == "drift" else -1
        ends = (lines[0].x[0], lines[0].x[-1])
        lines.append(Series(name="what may be lost", look="c3 dashed", x=ends, y=[sign * limit] * 2))
    return line_chart(lines, x_label="step", y_label=name) if lines else None


def _scatter(found: Judgement, pictures: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """Returns likeness by drift, each point with a picture of the first prompt that bears the trigger."""
    row = next((row for row, drawn in zip(pictures, found.drawn, strict=True) if drawn.with_trigger), None)
    placed = [
        (number, item.drift.value, item.likeness.value)
        for number, item in enumerate(found.scores)
        if item.drift is not None and item.likeness is not None
    ]
    if row is None or not placed:
        return None
    base = Series(name="base", look="", x=[0.0], y=[0.0])
    series = [
        Series(name=_name(found.scores[number]), look=f"c{number % COLOURS}", x=[drift], y=[likeness])
        for number, drift, likeness in placed
    ]
    axes = line_chart([base, *series], x_label="drift", y_label="likeness")
    if axes is None:
        return None
    ends = [line.points[0].split(",") for line in axes.lines]
    points = [
        Point(x=float(x), y=float(y), look=line.look, name=line.name, picture=row[number])
        for line, (x, y), number in zip(axes.lines, ends, [0, *(number + 1 for number, _, _ in placed)], strict=True)
    ]
    return {"axes": axes, "points": points}


def _thumbnail(folder: Path, name: str) -> str:
    """Returns a small picture as an address that holds it; "" where it is missing or no plain name."""
    if Path(name).name != name:
        return ""
    try:
        return data_url(read_data(folder / "pictures" / name), "jpeg")
    except DocumentError:
        return ""
