"""Line charts as places in per cent of the drawing area: lines stretch with their column, words keep their size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = 8  # that the style has, c0 to c7
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one line by rising x; `low` and `high` are the ends of an interval around y, if there is one."""

    name: str
    look: str  # classes of the style: a colour, and faint or dashed
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line as it is drawn: places as "x,y"; `band` is the outline of its interval."""

    name: str
    look: str
    points: Sequence[str]
    band: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What the macro `chart` draws; ticks are places with their words."""

    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> Chart | None:
    """Returns the chart, None where there is no finite point."""
    values = [value for line in series for value in (*line.y, *line.low, *line.high) if math.isfinite(value)]
    xs = [value for line in series for value in line.x]
    if not values or not xs:
        return None
    margin = (max(values) - min(values)) * 0.05 or abs(values[0]) * 0.1 or 1.0
    x_axis = _Axis(low=min(xs), high=max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_axis = _Axis(low=max(values) + margin, high=min(values) - margin)  # from the top down
    return Chart(
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        lines=[_line(x_axis, y_axis, line) for line in series],
    )


def ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between `low` and `high`, about five of them."""
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Maps values to places: `low` to 0, `high` to 100."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        return [(self.at(value), f"{value:g}") for value in ticks(*sorted((self.low, self.high)))]


def _line(x_axis: _Axis, y_axis: _Axis, line: Series) -> Line:
    def places(ys: Sequence[float]) -> list[str]:
        pairs = zip(line.x, ys, strict=True) if ys else ()
        return [f"{x_axis.at(x):.2f},{y_axis.at(y):.2f}" for x, y in pairs if math.isfinite(y)]

    band = places(line.high) + places(line.low)[::-1]
    return Line(name=line.name, look=line.look, points=places(line.y), band=band)
