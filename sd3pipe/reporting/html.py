"""The small pieces that the report page is made of: sections, tables, and two runs side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sd3pipe.reporting.collect import RunRecord


def section(title: str, content: str) -> str:
    """Returns a titled part of the page, nothing for one without content."""
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def side_by_side(runs: Sequence[RunRecord], contents: Sequence[str]) -> str:
    """Returns what is said of each run, in columns where there are two."""
    if not any(contents):
        return ""
    if len(runs) == 1:
        return contents[0]
    heads = [f"<b>{escape(run.name)}</b>" for run in runs]
    return '<div class="runs">' + "".join(f"<div>{h}{c}</div>" for h, c in zip(heads, contents, strict=True)) + "</div>"


def table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = (), differs: Sequence[bool] = ()) -> str:
    """Returns a table whose rows begin with a name; rows that `differs` marks stand out. Nothing without rows."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"] if heads else []
    for number, (name, *cells) in enumerate(rows):
        mark = ' class="differs"' if differs and differs[number] else ""
        shown = "".join(f'<td class="mono">{escape(text(cell))}</td>' for cell in cells)
        lines.append(f"<tr{mark}><th>{escape(str(name))}</th>{shown}</tr>")
    return f"<table>{''.join(lines)}</table>" if len(lines) > bool(heads) else ""


def bars(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    """Returns values as horizontal bars, each with what `show` says of it, nothing without values."""
    most = max(values.values(), default=0) or 1
    lines = [
        f"<tr><th>{escape(name)}</th><td><div class='bar' style='width:{200 * number / most:.0f}px'></div></td>"
        f"<td class='mono'>{escape(show(number))}</td></tr>"
        for name, number in values.items()
    ]
    return f"<table class='bars'>{''.join(lines)}</table>" if lines else ""


def text(value: Any) -> str:
    """Returns a value as a cell shows it."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {text(item)}" for key, item in value.items())
    return "" if value is None else str(value)
