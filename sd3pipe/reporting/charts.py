"""Line charts as SVG text: axes, grid, one polyline per series, and a band where a series has an interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 26, 34
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one line by rising x; `low` and `high` are the ends of an interval around y, if there is one.

    Lines of equal `colour` belong together; without one a line has the colour of its place.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False
    dashed: bool = False
    colour: int | None = None


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Returns an SVG element; a note instead of it where there is no finite point."""
    values = [value for line in series for value in (*line.y, *line.low, *line.high) if math.isfinite(value)]
    xs = [value for line in series for value in line.x]
    if not values or not xs:
        return '<p class="none">nothing was recorded</p>'
    frame = _Frame(min(xs), max(xs), min(values), max(values))
    parts = [*frame.grid(x_label, y_label)]
    for number, line in enumerate(series):
        parts += _line(frame, line, _colour(line, number))
    legend = "".join(
        f'<span><i style="background:{_colour(line, number)};opacity:{_opacity(line)}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(series)
    )
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg><div class="legend">{legend}</div>'


class _Frame:
    """Maps values to the drawing area."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        margin = (y_high - y_low) * 0.05 or abs(y_high) * 0.1 or 1.0
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_low, self.y_high = y_low - margin, y_high + margin

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, x_label: str, y_label: str) -> list[str]:
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        for value in ticks(self.x_low, self.x_high):
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
            )
        parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
        parts.append(f'<text x="4" y="4" dominant-baseline="hanging">{escape(y_label)}</text>')
        return parts


def ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between `low` and `high`, about five of them."""
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _colour(line: Series, number: int) -> str:
    return _COLOURS[(number if line.colour is None else line.colour) % len(_COLOURS)]


def _opacity(line: Series) -> float:
    return 0.25 if line.faint else 1


def _line(frame: _Frame, line: Series, colour: str) -> list[str]:
    parts = []
    if line.low and line.high:
        there = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
        back = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.low, strict=True)]
        parts.append(f'<polygon points="{" ".join(there + back[::-1])}" fill="{colour}" opacity="0.15"/>')
    points = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if len(points) == 1:
        x, y = points[0].split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    shape = f'points="{" ".join(points)}" fill="none"'
    parts.append(f'<polyline {shape} stroke="{colour}" opacity="{_opacity(line)}"{dashes}/>')
    return parts
