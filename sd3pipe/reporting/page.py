"""One self-contained HTML page about a run, or two side by side: nothing is fetched when it is opened."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sd3pipe.console import readable_bytes, readable_seconds, version
from sd3pipe.reporting.charts import Series, line_chart
from sd3pipe.reporting.collect import RunRecord, Sample
from sd3pipe.reporting.template import PAGE

_SMOOTH_OVER = 50  # steps of the running mean over the loss
_MAX_POINTS = 2000


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the page for one run, or for two that are compared."""
    names = [run.folder.resolve().name for run in runs]
    parts = [f"<h1>{escape(' and '.join(names))}</h1><p class='muted'>sd3pipe {escape(version())}</p>"]
    parts += [_summary(runs), _losses(runs), _validation(runs), _learning_rate(runs), _samples(runs)]
    parts += [_subsets(runs), _data(runs), _time_and_memory(runs), _parameters(runs), _events(runs), _provenance(runs)]
    return PAGE.substitute(title=escape(" and ".join(names)), body="\n".join(part for part in parts if part))


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _side_by_side(runs: Sequence[RunRecord], contents: Sequence[str]) -> str:
    if len(runs) == 1 or not any(contents):
        return contents[0]
    heads = [f"<b>{escape(run.folder.resolve().name)}</b>" for run in runs]
    return '<div class="runs">' + "".join(f"<div>{h}{c}</div>" for h, c in zip(heads, contents, strict=True)) + "</div>"


def _table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = (), differs: Iterable[bool] = ()) -> str:
    marks = list(differs)
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"] if heads else []
    for number, (name, *cells) in enumerate(rows):
        mark = ' class="differs"' if marks and marks[number] else ""
        shown = "".join(f'<td class="mono">{escape(_text(cell))}</td>' for cell in cells)
        lines.append(f"<tr{mark}><th>{escape(str(name))}</th>{shown}</tr>")
    return f"<table>{''.join(lines)}</table>" if len(lines) > bool(heads) else ""


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def _summary(runs: Sequence[RunRecord]) -> str:
    rows: list[list[Any]] = []
    keys = ("steps", "loss_first", "loss_last", "seconds_per_step", "exit_code", "device", "version")
    for key in keys:
        values = [run.report.get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append([key.replace("_", " "), *values])
    heads = ["", *(run.folder.resolve().name for run in runs)] if len(runs) > 1 else []
    return _table(rows, heads)


def _losses(runs: Sequence[RunRecord]) -> str:
    lines = []
    for run in runs:
        if run.steps:
            x, y = _thinned([(record["step"], record["loss"]) for record in run.steps])
            prefix = f"{run.folder.resolve().name}: " if len(runs) > 1 else ""
            lines.append(Series(name=f"{prefix}loss", x=x, y=y, faint=True))
            lines.append(Series(name=f"{prefix}running mean", x=x, y=_running_mean(y)))
    return _section("Loss", line_chart(lines, x_label="step", y_label="loss"))


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
    """Draws the loss on held-out pictures: the mean with its interval, and one line per timestep."""
    contents = []
    for run in runs:
        if not run.validations:
            contents.append("")
            continue
        x = [record["step"] for record in run.validations]
        y = [record["loss"] for record in run.validations]
        half = [record.get("interval", 0.0) or 0.0 for record in run.validations]
        low, high = [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)]
        lines = [Series(name="held-out loss", x=x, y=y, low=low, high=high)]
        for band in run.validations[0].get("bands", {}):
            values = [record["bands"].get(band, float("nan")) for record in run.validations]
            lines.append(Series(name=f"timestep {band}", x=x, y=values, faint=True))
        note = run.report.get("overfitting")
        text = f"<p>{escape(str(note))}</p>" if note else ""
        contents.append(line_chart(lines, x_label="step", y_label="loss") + text)
    return _section("Validation", _side_by_side(runs, contents)) if any(contents) else ""


def _learning_rate(runs: Sequence[RunRecord]) -> str:
    lines = []
    for run in runs:
        points = [(record["step"], record["learning_rate"]) for record in run.steps if "learning_rate" in record]
        if points:
            x, y = _thinned(points)
            lines.append(Series(name=run.folder.resolve().name, x=x, y=y))
    return _section("Learning rate", line_chart(lines, x_label="step", y_label="rate")) if lines else ""


def _samples(runs: Sequence[RunRecord]) -> str:
    contents = [_sample_slider(run.samples) for run in runs]
    return _section("Samples", _side_by_side(runs, contents)) if any(contents) else ""


def _sample_slider(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    steps = sorted({sample.step for sample in samples})
    figures = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        pictures = "".join(
            f'<img data-step="{sample.step}" alt="{escape(prompt)}" src="{_data_url(sample.path)}">'
            for sample in samples
            if sample.prompt == prompt
        )
        figures.append(f"<figure>{pictures}<figcaption>{escape(prompt)}</figcaption></figure>")
    slider = f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
    body = f'<p>{slider} <output></output></p><div class="samples">{"".join(figures)}</div>'
    return f'<section data-steps="{",".join(map(str, steps))}">{body}</section>'


def _data_url(path: Path) -> str:
    kind = {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _subsets(runs: Sequence[RunRecord]) -> str:
    contents = []
    for run in runs:
        subsets = run.report.get("subsets") or {}
        keys = list(dict.fromkeys(key for values in subsets.values() for key in values))
        rows = [[name, *(values.get(key) for key in keys)] for name, values in subsets.items()]
        contents.append(_table(rows, ["subset", *(key.replace("_", " ") for key in keys)]))
    return _section("Subsets", _side_by_side(runs, contents)) if any(contents) else ""


def _data(runs: Sequence[RunRecord]) -> str:
    contents = []
    for run in runs:
        data = run.report.get("data") or {}
        contents.append(_table([[key.replace("_", " "), value] for key, value in data.items()]))
    return _section("Buckets and captions", _side_by_side(runs, contents)) if any(contents) else ""


def _time_and_memory(runs: Sequence[RunRecord]) -> str:
    contents = []
    for run in runs:
        rows: list[list[str]] = []
        for key, value in run.report.items():
            if key.endswith("_bytes") and isinstance(value, int | float):
                rows.append([key.removesuffix("_bytes").replace("_", " "), readable_bytes(value)])
            elif key in ("seconds", "seconds_per_step") and isinstance(value, int | float):
                rows.append([key.replace("_", " "), readable_seconds(value)])
        rows += [[f"phase {name}", readable_seconds(value)] for name, value in (run.report.get("phases") or {}).items()]
        plan = run.report.get("plan") or {}
        rows += [[f"{name}: predicted, measured", _text(value)] for name, value in plan.items()]
        contents.append(_table(rows))
    return _section("Time and memory", _side_by_side(runs, contents)) if any(contents) else ""


def _parameters(runs: Sequence[RunRecord]) -> str:
    options = [run.report.get("options") or {} for run in runs]
    names = sorted({name for values in options for name in values})
    rows = [[name, *(values.get(name) for values in options)] for name in names]
    differs = [len({_text(value) for value in row[1:]}) > 1 for row in rows]
    heads = ["option", *(run.folder.resolve().name for run in runs)] if len(runs) > 1 else []
    return _section("Options", _table(rows, heads, differs))


def _events(runs: Sequence[RunRecord]) -> str:
    contents = [
        _table(
            [f"step {event['step']}", {k: v for k, v in event.items() if k not in ("kind", "step")}]
            for event in run.events
        )
        for run in runs
    ]
    return _section("Events", _side_by_side(runs, contents)) if any(contents) else ""


def _provenance(runs: Sequence[RunRecord]) -> str:
    contents = [_table([key, value] for key, value in run.inputs.items()) for run in runs]
    return _section("Provenance", _side_by_side(runs, contents)) if any(contents) else ""
