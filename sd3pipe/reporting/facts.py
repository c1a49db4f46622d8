"""The parts of the report page that are tables: what was trained on, what it cost, with which options, from what."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from sd3pipe.console import readable_bytes, readable_seconds
from sd3pipe.reporting.collect import RunRecord
from sd3pipe.reporting.html import bars, section, side_by_side, table, text

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


def data(runs: Sequence[RunRecord]) -> str:
    """Returns counts, buckets and subsets, and what the encode stage counted of the captions."""
    return section("Pictures and captions", side_by_side(runs, [_data(run) for run in runs]))


def _data(run: RunRecord) -> str:
    facts, captions = run.report.get("data") or {}, run.text_report.get("captions") or {}
    seen = run.report.get("subsets") or {}
    subsets = {name: {**values, **seen.get(name, {})} for name, values in (facts.get("subsets") or {}).items()}
    keys = list(dict.fromkeys(key for values in subsets.values() for key in values))
    rows = [[name, *(values.get(key) for key in keys)] for name, values in subsets.items()]
    parts = [
        table(_named(facts, _COUNTS)),
        table(rows, ["subset", *(key.replace("_", " ") for key in keys)]),
        _titled("Buckets", bars(facts.get("buckets") or {}, lambda rows: f"{text(rows)} rows")),
        _titled("Captions", table(_named(captions, _CAPTIONS))),
        _titled(
            "Most frequent in captions",
            bars(captions.get("most_frequent") or {}, lambda times: f"{text(times)} captions"),
        ),
    ]
    cut = run.text_report.get("cut") or []
    parts += [f"<p>{len(cut)} texts were cut when they were last encoded.</p>"] if cut else []
    return "".join(part for part in parts if part)


def time_and_memory(runs: Sequence[RunRecord]) -> str:
    """Returns time by phase, peaks of memory, and what the planner had predicted."""
    contents = [_phases(run) + _peaks(run) + _predictions(run) for run in runs]
    return section("Time and memory", side_by_side(runs, contents))


def _phases(run: RunRecord) -> str:
    stages = (("encode-text", run.text_report), ("encode-latents", run.latents_report))
    seconds = {f"{name}, last run": report["seconds"] for name, report in stages if "seconds" in report}
    seconds |= {f"train, {name}": value for name, value in (run.report.get("phases") or {}).items()}
    return bars(seconds, readable_seconds)


def _peaks(run: RunRecord) -> str:
    names = {"peak_rss_bytes": "most host memory", "peak_device_bytes": "most device memory"}
    names["streamed_bytes"] = "weights copied to the device"
    rows = [[title, readable_bytes(run.report[key])] for key, title in names.items() if run.report.get(key)]
    return table(rows)


def _predictions(run: RunRecord) -> str:
    memory = run.report.get("memory") or {}
    rows = []
    for key, title, shown in (
        ("device_bytes", "device memory", readable_bytes),
        ("seconds_per_step", "time of a step", readable_seconds),
    ):
        pair = memory.get(key) or {}
        values = [pair.get("predicted"), pair.get("measured")]
        if any(values):
            rows.append([title, *("" if not value else shown(value) for value in values)])
    return _titled("What was planned, and what came", table(rows, ["", "predicted", "measured"]))


def parameters(runs: Sequence[RunRecord]) -> str:
    """Returns all options; of two runs, those that differ first and marked."""
    options = [run.report.get("options") or {} for run in runs]
    names = sorted({name for values in options for name in values})
    rows = [[name, *(values.get(name) for values in options)] for name in names]
    differing = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    same = [row for row in rows if row not in differing]
    heads = ["option", *(run.name for run in runs)] if len(runs) > 1 else []
    changed = table(differing, heads, [True] * len(differing))
    rest = table(same, heads)
    folded = f"<details><summary>{len(same)} options{' that are equal' if changed else ''}</summary>{rest}</details>"
    return section("Options", changed + (folded if rest else ""))


def events(runs: Sequence[RunRecord]) -> str:
    """Returns what happened once: a resume, a rollback."""
    contents = [
        table(
            [f"step {event['step']}", {key: value for key, value in event.items() if key not in ("kind", "step")}]
            for event in run.events
        )
        for run in runs
    ]
    return section("Events", side_by_side(runs, contents))


def provenance(runs: Sequence[RunRecord]) -> str:
    """Returns what the adapter was made from, as final/inputs.json has it."""
    contents = [table(_flat("", run.inputs)) for run in runs]
    folded = [f"<details><summary>inputs.json</summary>{content}</details>" if content else "" for content in contents]
    return section("Provenance", side_by_side(runs, folded))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[list[Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield [f"{prefix}{key}", value]


def _named(values: Mapping[str, Any], titles: Mapping[str, str]) -> list[list[Any]]:
    return [[title, values[key]] for key, title in titles.items() if key in values]


def _titled(title: str, content: str) -> str:
    return f"<h3>{escape(title)}</h3>{content}" if content else ""
