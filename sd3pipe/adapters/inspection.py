"""What there is to see in an adapter: ranks, strengths, norms by block and part, as values, as text, as a picture."""

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sd3pipe.adapters.files import AdapterFile
from sd3pipe.adapters.targets import BLOCK_PARTS, block_of, part_of

K = TypeVar("K", str, int, float)

_CELL, _LEFT, _TOP = 18, 110, 44
_NARROWEST = 420  # holds the line below the cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """`norms` are the Frobenius norms of the changes by module path; a DoRA's is that of its direction."""

    forms: tuple[str, ...]
    variants: tuple[str, ...]
    depth: int
    algorithms: Mapping[str, int]
    ranks: Mapping[int, int]
    strengths: Mapping[float, int]
    parameters: int
    norms: Mapping[str, float]
    unknown: tuple[str, ...]


def inspect(file: AdapterFile) -> Inspection:
    """Returns what can be told from the tensors of a file."""
    deltas = file.adapter.values()
    return Inspection(
        forms=file.forms,
        variants=file.variants,
        depth=file.depth,
        algorithms=_counted(delta.algorithm for delta in deltas),
        ranks=_counted(delta.rank for delta in deltas),
        strengths=_counted(round(delta.scale, 6) for delta in deltas),
        parameters=sum(tensor.numel() for delta in deltas for tensor in delta.tensors().values()),
        norms={path: delta.norm() for path, delta in file.adapter.items()},
        unknown=file.unknown,
    )


def norms_by_part(norms: Mapping[str, float], depth: int) -> list[list[float | None]]:
    """Returns, for each part of BLOCK_PARTS and each block, the norm of all changes there; None where there is none."""
    squares: dict[tuple[str, int], float] = {}
    for path, norm in norms.items():
        block = block_of(path)
        if block is not None:
            place = (str(part_of(path)), block)
            squares[place] = squares.get(place, 0.0) + norm * norm
    roots = {place: math.sqrt(square) for place, square in squares.items()}
    return [[roots.get((part, block)) for block in range(depth)] for part in BLOCK_PARTS]


def norm_table(norms: Mapping[str, float], depth: int) -> list[str]:
    """Returns the norms as lines of text: a row per block, a column per part, then the layers outside the blocks."""
    columns = norms_by_part(norms, depth)
    lines = ["block " + "".join(f"{part:>14}" for part in BLOCK_PARTS)]
    for block in range(depth):
        cells = (column[block] for column in columns)
        lines.append(f"{block:>5} " + "".join(f"{'-' if cell is None else f'{cell:.4g}':>14}" for cell in cells))
    outside = {path: norm for path, norm in norms.items() if block_of(path) is None}
    return lines + [f"{path}  {norm:.4g}" for path, norm in outside.items()]


def norm_picture(title: str, norms: Mapping[str, float], depth: int) -> str:
    """Returns an SVG: blocks from left to right, parts from top to bottom, darker for larger changes."""
    rows = norms_by_part(norms, depth)
    largest = max((cell for row in rows for cell in row if cell is not None), default=0.0) or 1.0
    width, height = max(_LEFT + depth * _CELL + 20, _NARROWEST), _TOP + len(BLOCK_PARTS) * _CELL + 40
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{html.escape(title)}</text>',
        f'<text x="8" y="{height - 10}">norm of the weight change; darkest: {largest:.4g}, grey: not adapted</text>',
    ]
    for y, (part, row) in enumerate(zip(BLOCK_PARTS, rows, strict=True)):
        parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + y * _CELL + 13}" text-anchor="end">{part}</text>')
        parts += [_cell(x, y, f"block {x}, {part}", cell, largest) for x, cell in enumerate(row)]
    parts += [
        f'<text x="{_LEFT + x * _CELL + _CELL / 2}" y="{_TOP - 6}" text-anchor="middle">{x}</text>'
        for x in range(0, depth, 5)
    ]
    return "\n".join([*parts, "</svg>", ""])


def _cell(x: int, y: int, place: str, norm: float | None, largest: float) -> str:
    fill = "#f4f4f4" if norm is None else f"hsl(212, 75%, {round(95 - 65 * norm / largest)}%)"
    label = f"{place}: {'not adapted' if norm is None else f'{norm:.4g}'}"
    corner = f'x="{_LEFT + x * _CELL}" y="{_TOP + y * _CELL}"'
    return f'<rect {corner} width="{_CELL - 1}" height="{_CELL - 1}" fill="{fill}"><title>{label}</title></rect>'


def _counted(values: Iterable[K]) -> dict[K, int]:
    return dict(sorted(Counter(values).items()))
