"""Grids of sample pictures with their labels, as PNG files. Imports PIL."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sd3pipe.data.headers import DECODER_ERRORS, open_picture, reason
from sd3pipe.data.places import read_picture
from sd3pipe.diffusion.kept_latents import PARAMETERS
from sd3pipe.errors import InputError, UnreadablePicture
from sd3pipe.files import write_bytes

_GAP_PX = 6
_TITLE_LINES = 4
_SMALLEST_CELL_PX = 96  # tiny pictures are enlarged to this, by whole factors, so that labels fit beside them
_BACKGROUND, _INK, _EMPTY = (255, 255, 255), (30, 30, 30), (228, 228, 228)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Pictures [row][column], uint8 [H, W, 3]; None leaves a cell empty. Labels name the columns and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    pictures: Sequence[Sequence[NDArray[np.uint8] | None]]


def save_picture(path: Path, picture: NDArray[np.uint8], *, title: str = "", parameters: str = "") -> None:
    """Writes one picture [H, W, 3] as PNG, atomically, with its prompt and what it was drawn with as texts.

    Raises StorageError.
    """
    info = _title(title)
    if parameters:
        info.add_text(PARAMETERS, parameters)  # plain tEXt where Latin-1 has its letters, as the web's tools expect
    _write(path, Image.fromarray(picture), info)


def read_picture_file(path: Path) -> NDArray[np.uint8]:
    """Returns a picture [H, W, 3] of a PNG that save_picture wrote. Raises InputError for what is no picture."""
    try:
        return np.asarray(open_picture(read_picture(path)).convert("RGB"))
    except (UnreadablePicture, *DECODER_ERRORS) as error:
        raise InputError(f"{path}: is no whole picture ({reason(error)}): delete it and draw again") from error


def save_grid(path: Path, grid: Grid) -> None:
    """Writes a grid as PNG, atomically. Raises StorageError."""
    _write(path, render_grid(grid), _title(grid.title))


def render_grid(grid: Grid) -> Image.Image:
    """Returns the picture of a grid: the title, then labelled columns, then one line of pictures for each row."""
    shown = [picture for line in grid.pictures for picture in line if picture is not None]
    height, width = (max((picture.shape[axis] for picture in shown), default=_SMALLEST_CELL_PX) for axis in (0, 1))
    factor = max(1, -(-_SMALLEST_CELL_PX // min(height, width)))
    cell_height, cell_width = height * factor, width * factor
    font = ImageFont.load_default(max(10, min(20, cell_width // 10)))
    line_height = round(font.getbbox("Ag")[3] * 1.3)
    row_labels = max((round(font.getlength(label)) for label in grid.rows), default=0) + 2 * _GAP_PX
    total_width = row_labels + len(grid.columns) * (cell_width + _GAP_PX) + _GAP_PX
    letters = max(10, round(total_width / max(1.0, font.getlength("n"))) - 2)
    title = textwrap.wrap(grid.title, letters, max_lines=_TITLE_LINES, placeholder=" ...")
    labels = [textwrap.wrap(label, max(6, round(cell_width / font.getlength("n")))) for label in grid.columns]
    head = (len(title) + max(map(len, labels), default=0)) * line_height + 3 * _GAP_PX
    image = Image.new("RGB", (total_width, head + len(grid.rows) * (cell_height + _GAP_PX)), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(title):
        draw.text((_GAP_PX, _GAP_PX + number * line_height), text, fill=_INK, font=font)
    for column, lines in enumerate(labels):
        x = row_labels + column * (cell_width + _GAP_PX)
        y = 2 * _GAP_PX + len(title) * line_height
        draw.multiline_text((x, y), "\n".join(lines), fill=_INK, font=font, spacing=2)
    for row, (label, line) in enumerate(zip(grid.rows, grid.pictures, strict=True)):
        y = head + row * (cell_height + _GAP_PX)
        draw.text((_GAP_PX, y + cell_height // 2 - line_height // 2), label, fill=_INK, font=font)
        for column, picture in enumerate(line):
            x = row_labels + column * (cell_width + _GAP_PX)
            _place(image, picture, (x, y), (cell_width, cell_height), factor)
    return image


def _place(
    image: Image.Image,
    picture: NDArray[np.uint8] | None,
    corner: tuple[int, int],
    cell: tuple[int, int],
    factor: int,
) -> None:
    if picture is None:
        image.paste(_EMPTY, (*corner, corner[0] + cell[0], corner[1] + cell[1]))
        return
    enlarged = Image.fromarray(picture)
    if factor > 1:
        enlarged = enlarged.resize((enlarged.width * factor, enlarged.height * factor), Image.Resampling.NEAREST)
    image.paste(enlarged, corner)


def _title(title: str) -> PngInfo:
    info = PngInfo()
    if title:
        info.add_itxt("Description", title)
    return info


def _write(path: Path, image: Image.Image, info: PngInfo) -> None:
    data = BytesIO()
    image.save(data, format="PNG", pnginfo=info)
    write_bytes(path, data.getvalue())
