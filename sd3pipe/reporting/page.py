"""One self-contained HTML page about a run, or two side by side: nothing is fetched when it is opened."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sd3pipe.console import version
from sd3pipe.reporting.charts import Series, line_chart
from sd3pipe.reporting.collect import RunRecord, Sample
from sd3pipe.reporting.facts import data, events, parameters, provenance, time_and_memory
from sd3pipe.reporting.html import section, side_by_side, table
from sd3pipe.reporting.template import PAGE

_SMOOTH_OVER = 50  # steps of the running mean over the loss
_MAX_POINTS = 2000
_SUMMARY = ("steps", "loss_first", "loss_last", "loss_mean", "best_step", "seconds_per_step", "exit_code", "version")


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the page for one run, or for two that are compared."""
    title = escape(" and ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1><p class='muted'>sd3pipe {escape(version())}</p>"]
    parts += [_summary(runs), _samples(runs), _losses(runs), _validation(runs), _learning_rate(runs)]
    parts += [data(runs), time_and_memory(runs), parameters(runs), events(runs), provenance(runs)]
    return PAGE.substitute(title=title, body="\n".join(part for part in parts if part))


def _summary(runs: Sequence[RunRecord]) -> str:
    rows: list[list[Any]] = []
    for key in _SUMMARY:
        values = [run.report.get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append([key.replace("_", " "), *values])
    return table(rows, ["", *(run.name for run in runs)] if len(runs) > 1 else [])


def _losses(runs: Sequence[RunRecord]) -> str:
    lines = []
    for number, run in enumerate(runs):
        if run.steps:
            x, y = _thinned([(record["step"], record["loss"]) for record in run.steps])
            prefix = f"{run.name}: " if len(runs) > 1 else ""
            lines.append(Series(name=f"{prefix}loss", x=x, y=y, faint=True, colour=number))
            lines.append(Series(name=f"{prefix}running mean", x=x, y=_running_mean(y), colour=number))
    return section("Loss", line_chart(lines, x_label="step", y_label="loss"))


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    every = max(1, len(points) // _MAX_POINTS)
    kept = [*points[::every], points[-1]] if (len(points) - 1) % every else points[::every]
    return [x for x, _ in kept], [y for _, y in kept]


def _running_mean(values: Sequence[float]) -> list[float]:
    means: list[float] = []
    for number, value in enumerate(values):
        weight = 1 / min(number + 1, _SMOOTH_OVER)
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means


def _validation(runs: Sequence[RunRecord]) -> str:
    """Draws the loss on held-out pictures: the mean with its interval, and one line per noise level."""
    contents = []
    for run in runs:
        if not run.validations:
            contents.append("")
            continue
        x = [record["step"] for record in run.validations]
        y = [record["loss"] for record in run.validations]
        half = [record.get("ci95") or 0.0 for record in run.validations]
        low, high = [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)]
        lines = [Series(name="held-out loss, 95 % interval", x=x, y=y, low=low, high=high)]
        for band in run.validations[0].get("bands", {}):
            values = [record["bands"].get(band, float("nan")) for record in run.validations]
            lines.append(Series(name=band.replace("_", " "), x=x, y=values, dashed=True))
        note = run.report.get("validation")
        text = f"<p>{escape(str(note))}</p>" if note else ""
        contents.append(line_chart(lines, x_label="step", y_label="loss") + text)
    return section("Validation", side_by_side(runs, contents))


def _learning_rate(runs: Sequence[RunRecord]) -> str:
    lines = []
    for run in runs:
        points = [(record["step"], record["learning_rate"]) for record in run.steps if "learning_rate" in record]
        if points:
            x, y = _thinned(points)
            lines.append(Series(name=run.name, x=x, y=y))
    return section("Learning rate", line_chart(lines, x_label="step", y_label="rate")) if lines else ""


def _samples(runs: Sequence[RunRecord]) -> str:
    return section("Samples", side_by_side(runs, [_sample_grid(run.samples) for run in runs]))


def _sample_grid(samples: Sequence[Sample]) -> str:
    """Returns prompts by steps as a grid, and a slider that shows one step large; each picture is in the page once."""
    if not samples:
        return ""
    steps = sorted({sample.step for sample in samples})
    picture_at = {(sample.prompt, sample.step): sample for sample in samples}
    titles = {sample.prompt: sample.title or sample.prompt for sample in samples}
    large = "".join(
        f"<figure><img class='large' data-prompt='{number}' alt=''><figcaption>{escape(title)}</figcaption></figure>"
        for number, title in enumerate(titles.values())
    )
    heads = "".join(f"<th data-step='{step}'>{step}</th>" for step in steps)
    lines = [
        f"<tr><th>{escape(title)}</th>{''.join(_cell(picture_at.get((prompt, step)), number) for step in steps)}</tr>"
        for number, (prompt, title) in enumerate(titles.items())
    ]
    slider = f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
    grid = f"<table><tr><th>step</th>{heads}</tr>{''.join(lines)}</table>"
    shown = f'<p class="slider">{slider} <output></output></p><div class="samples">{large}</div>'
    folded = f"<details open><summary>all steps</summary><div class='grid'>{grid}</div></details>"
    return f'<section data-steps="{",".join(map(str, steps))}">{shown}{folded}</section>'


def _cell(sample: Sample | None, prompt: int) -> str:
    if sample is None:
        return "<td></td>"
    return (
        f"<td><img class='small' data-prompt='{prompt}' data-step='{sample.step}' alt='step {sample.step}' "
        f'src="{_data_url(sample.path)}"></td>'
    )


def _data_url(path: Path) -> str:
    kind = {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
