"""One self-contained HTML page about a run, or two side by side: nothing is fetched when it is opened."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sd3pipe.console import count, readable_bytes, readable_seconds
from sd3pipe.judgement import JUDGE_FOLDER
from sd3pipe.pages.charts import COLOURS, Chart, Series, line_chart
from sd3pipe.pages.judgement import judgement_facts
from sd3pipe.pages.render import data_url
from sd3pipe.pages.render import render as render_template
from sd3pipe.picture_losses import PictureLosses
from sd3pipe.reporting.collect import RunRecord, SamplePicture

Rows = list[list[Any]]  # a name, and the cells behind it

_SUMMARY = ("steps", "loss_first", "loss_last", "loss_mean", "best_step", "seconds_per_step", "exit_code", "version")
_MAX_POINTS = 2000
_MOST_PICTURES = 20
_COUNTS = {
    "pictures": "pictures",
    "held_out": "held out",
    "pictures_per_epoch": "pictures per epoch, repeats included",
    "captions": "text rows",
}
_CAPTIONS = {
    "captions": "captions, variants included",
    "different": "different ones",
    "empty": "empty",
    "words_median": "words, median",
    "words_most": "words, most",
}
_PEAKS = {
    "peak_rss_bytes": "most host memory",
    "peak_device_bytes": "most device memory",
    "streamed_bytes": "weights copied to the device",
}
_PREDICTED = {
    "device_bytes": ("device memory", readable_bytes),
    "seconds_per_step": ("time of a step", readable_seconds),
}


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the page for one run, or for two that are compared."""
    options = [run.report.get("options") or {} for run in runs]
    rows = [[name, *(values.get(name) for values in options)] for name in sorted(set().union(*options))]
    differing = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    summary = [[key.replace("_", " "), *(run.report.get(key) for run in runs)] for key in _SUMMARY]
    rates = [_curve(run, "learning_rate", name=run.name, look=f"c{number}") for number, run in enumerate(runs)]
    return render_template(
        "reporting/page.html",
        title=" and ".join(run.name for run in runs),
        runs=[_facts(run) for run in runs],
        summary=[row for row in summary if any(value is not None for value in row[1:])],
        losses=_losses(runs),
        learning_rates=line_chart(rates, x_label="step", y_label="rate"),
        differing_options=differing,
        equal_options=[row for row in rows if row not in differing],
    )


def _facts(run: RunRecord) -> dict[str, Any]:
    """Returns what the page says of one run, in the order of the page; of what is missing it says nothing."""
    report, text = run.report, run.encoded("text")
    data, captions = report.get("data") or {}, text.get("captions") or {}
    encodings = (("encode-text", text), ("encode-latents", run.encoded("latents")))
    before = {f"{name}, last run before": stage["seconds"] for name, stage in encodings if "seconds" in stage}
    phases = {f"train, {name}": seconds for name, seconds in (report.get("phases") or {}).items()}
    return {
        "name": run.name,
        "sample_steps": sorted({sample.step for sample in run.samples}),
        "samples": _samples(run.samples),
        "validation": _validation(run.validations),
        "verdict": report.get("validation"),
        "judgement": judgement_facts(run.judgement, run.folder / JUDGE_FOLDER),
        "learnt": _learnt(run.pictures),
        "hardest": _hardest(run.pictures),
        "counts": _named(data, _COUNTS),
        "subsets": _subsets(data.get("subsets") or {}, report.get("subsets") or {}),
        "buckets": _bars(data.get("buckets"), lambda rows: count(rows, "row")),
        "captions": _named(captions, _CAPTIONS),
        "frequent": _bars(captions.get("most_frequent"), lambda times: count(times, "caption")),
        "cut": text.get("cut") or 0,
        "phases": _bars(before | phases, readable_seconds),
        "peaks": [[title, readable_bytes(report[key])] for key, title in _PEAKS.items() if report.get(key)],
        "predictions": _predictions(report.get("memory") or {}),
        "events": [
            [f"step {event['step']}", {key: value for key, value in event.items() if key not in ("kind", "step")}]
            for event in run.events
        ],
        "provenance": list(_flat("", run.inputs)),
    }


def _losses(runs: Sequence[RunRecord]) -> Chart | None:
    """Returns the loss of each step and its running mean."""
    lines = []
    for number, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        lines.append(_curve(run, "loss", name=f"{prefix}loss", look=f"c{number} faint"))
        lines.append(_curve(run, "loss_mean", name=f"{prefix}running mean", look=f"c{number}"))
    return line_chart(lines, x_label="step", y_label="loss")


def _curve(run: RunRecord, key: str, *, name: str, look: str) -> Series:
    """Returns one number of the steps, thinned to what a screen can show."""
    there = [record for record in run.steps if record.get(key) is not None]
    kept = there[:: max(1, len(there) // _MAX_POINTS)]
    kept += there[-1:] if kept[-1:] != there[-1:] else []
    return Series(name=name, look=look, x=[record["step"] for record in kept], y=[record[key] for record in kept])


def _validation(records: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Returns the loss on held-out pictures: the mean with its interval, and one line per noise level."""
    x = [record["step"] for record in records]
    y = [record["loss"] for record in records]
    half = [record.get("ci95") or 0.0 for record in records]
    low, high = [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)]
    lines = [Series(name="held-out loss, 95 % interval", look="c0", x=x, y=y, low=low, high=high)]
    for number, band in enumerate(records[0].get("bands", {}) if records else (), 1):
        values = [record["bands"].get(band, float("nan")) for record in records]
        lines.append(Series(name=band.replace("_", " "), look=f"c{number % COLOURS} dashed", x=x, y=values))
    return line_chart(lines, x_label="step", y_label="loss")


def _samples(samples: Sequence[SamplePicture]) -> list[tuple[str, dict[int, str]]]:
    """Returns each prompt's words and its pictures by step."""
    titles: dict[str, str] = {}
    pictures: dict[str, dict[int, str]] = defaultdict(dict)
    for sample in samples:
        titles[sample.prompt] = sample.title or sample.prompt
        pictures[sample.prompt][sample.step] = data_url(sample.data, sample.kind)
    return [(title, pictures[prompt]) for prompt, title in titles.items()]


def _subsets(planned: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Returns the names of the subsets, then a row per fact."""
    subsets = {name: {**values, **seen.get(name, {})} for name, values in planned.items()}
    keys = dict.fromkeys(key for values in subsets.values() for key in values)
    rows = [[key.replace("_", " "), *(values.get(key) for values in subsets.values())] for key in keys]
    return [["", *subsets], *rows]


def _learnt(pictures: Sequence[PictureLosses]) -> str:
    """Returns of how many pictures something was learnt, as far as the losses of training tell."""
    told = [picture for picture in pictures if picture.learnt is not None]
    if not told:
        return ""
    learnt = f"{sum(bool(picture.learnt) for picture in told)} of {count(len(told), 'picture')}"
    return f"Of {learnt} the loss fell measurably from the first third of its views on."


def _hardest(pictures: Sequence[PictureLosses]) -> Rows:
    """Returns the pictures whose losses stand highest among those of equal noise, with what was gained of each."""
    rows = []
    for item in sorted(pictures, key=lambda picture: -picture.quantile)[:_MOST_PICTURES]:
        if item.learnt is not None:
            gained = item.gained.shown("+.1%") if item.gained and item.gained.low is not None else ""
            learnt = "" if item.learnt else "not learnt"
            rows.append([f"{item.subset}/{item.name}", f"{item.quantile:.2f}", gained, learnt])
    return rows


def _predictions(memory: Mapping[str, Any]) -> Rows:
    """Returns what the planner had predicted beside what was measured."""
    pairs = {key: [(memory.get(key) or {}).get(which) for which in ("predicted", "measured")] for key in _PREDICTED}
    rows = ([title, *(show(n) if n else "" for n in pairs[key])] for key, (title, show) in _PREDICTED.items())
    return [row for row in rows if any(row[1:])]


def _bars(values: Mapping[str, Any] | None, words: Callable[[Any], str]) -> Rows:
    return [[name, number, words(number)] for name, number in (values or {}).items()]


def _named(values: Mapping[str, Any], titles: Mapping[str, str]) -> Rows:
    return [[title, values[key]] for key, title in titles.items() if key in values]


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[list[Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield [f"{prefix}{key}", value]
