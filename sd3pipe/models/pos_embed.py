"""Where image tokens sit: crops of the checkpoint's position table, and the tables of sd-scripts' scaled variant."""

# h w patches of the picture, P side of a square table in patches, L = h w tokens, D width, B batch

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from math import isqrt

import torch
from torch import Tensor

from sd3pipe.errors import InputError

_GRID_SPAN = 16.0  # sd-scripts: the middle of every scaled table spans the coordinates 0 to 16
_MARGIN = 1.5  # sd-scripts: a scaled table is 1.5 times as wide as its resolution's own grid


def crop_positions(table_LD: Tensor, height: int, width: int, offset: tuple[int, int] | None = None) -> Tensor:
    """Returns the position codes [h w, D] of a window of a square table, the middle one unless `offset` is given.

    `offset` is (top, left) in patches, for pos_emb_random_crop: the caller draws it within `crop_range`.
    Raises InputError where the window does not fit.
    """
    side = isqrt(table_LD.shape[0])
    rows, columns = crop_range(side, height, width)
    top, left = offset if offset is not None else (rows // 2, columns // 2)
    if not (0 <= top <= rows and 0 <= left <= columns):
        raise InputError(f"position crop ({top}, {left}) leaves the table: at most ({rows}, {columns}) fits here")
    table_PPD = table_LD.unflatten(0, (side, side))
    return table_PPD[top : top + height, left : left + width].flatten(0, 1)


def crop_range(side: int, height: int, width: int) -> tuple[int, int]:
    """Returns the largest (top, left) that a window of height x width patches may have. Raises InputError."""
    if height > side or width > side:
        raise InputError(
            f"a picture of {height} x {width} patches is larger than the model's position table of {side} x {side}: "
            f"no side may exceed {side * 16} pixels"
        )
    return side - height, side - width


def beside(positions_LD: Tensor, x_BLD: Tensor) -> Tensor:
    """Returns the codes in the number format of x and on its device.

    Tables may stay on the host (450 MB in SD3.5-medium); the window then goes through page-locked memory, so that the
    host does not wait for the device.
    """
    codes_LD = positions_LD.to(x_BLD.dtype)
    if x_BLD.is_cuda and not codes_LD.is_cuda:
        return codes_LD.pin_memory().to(x_BLD.device, non_blocking=True)
    return codes_LD.to(x_BLD.device)


class ScaledPositions:
    """Position tables whose middle always spans the same range of coordinates, one per training resolution.

    sd-scripts' --enable_scaled_pos_embed (sd-scripts-semantics, section 5): a picture takes the table whose own grid is
    nearest in area, so that small and large pictures see the same coordinates. Inference programs do not do this.
    """

    def __init__(self, resolutions_px: Iterable[tuple[int, int]], width: int) -> None:
        sides = {round((w * h) ** 0.5) // 8 // 2 for w, h in resolutions_px}
        if not sides or min(sides) < 1:
            raise InputError("scaled position tables need at least one resolution of 16 x 16 pixels or more")
        self.width = width
        self.sides = sorted(sides)
        areas = [side**2 for side in self.sides]
        self._limits = [(a + b) / 2 for a, b in pairwise(areas)]
        self._limits.append((_MARGIN * self.sides[-1]) ** 2)
        self._tables: dict[int, Tensor] = {}

    def table(self, height: int, width: int) -> Tensor:
        """Returns the table [P P, D] in float32 for a picture of height x width patches."""
        chosen = bisect_left(self._limits, height * width)
        side = self.sides[chosen] if chosen < len(self.sides) else max(height, width)
        if max(height, width) > int(_MARGIN * side):
            side = max(height, width)
        if side not in self._tables:
            self._tables[side] = scaled_table(side, self.width)
        return self._tables[side]


def scaled_table(side: int, width: int) -> Tensor:
    """Returns a table of int(1.5 side)^2 codes [P P, D] whose middle side x side spans the coordinates 0 to 16."""
    grid = int(_MARGIN * side)
    line_P = _GRID_SPAN * (torch.arange(grid, dtype=torch.float64) - (grid - side) / 2) / side
    row_PP, column_PP = torch.meshgrid(line_P, line_P, indexing="ij")
    # The first half of the width encodes the column, as in MAE's get_2d_sincos_pos_embed, where "w goes first".
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half // 2, dtype=torch.float64) / (half / 2))
    angles = [axis_PP.flatten()[:, None] * frequencies for axis_PP in (column_PP, row_PP)]
    return torch.cat([part for axis in angles for part in (axis.sin(), axis.cos())], dim=-1).float()
