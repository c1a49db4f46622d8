"""Reads shape, colour, size and background off a picture: a hand-written measure, no network, no training.

The border tells the background. What differs from it is the subject: its mean tells the colour, its area, place and
overlap with each shape drawn at the same area and place tell shape and size.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3pipe.demo.drawings import ALL_OUTLINES, BACKGROUNDS, COLOURS, RADII, Colour, coverage

_BORDER_PX = 3
_BORDER_SPREAD = 45.0  # mean distance of border pixels from their median; true drawings stay under 5, noise is over 100
_CONTRAST = 0.5  # a pixel belongs to the subject if it lies nearer to the subject's colour than to the background's
_SMALLEST_AREA = 0.01  # of the picture
_SMALLEST_OVERLAP = 0.72  # intersection over union with the best shape
_SMALLEST_RING_OVERLAP = 0.66  # a thin outline loses more of its overlap to a blur than a solid shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a picture shows, in the words of the grammar; None where it shows nothing that the grammar names."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None


def read_picture(picture: NDArray[np.uint8]) -> Reading:
    """Returns what the picture [height, width, 3] shows."""
    pixels = picture.astype(np.float32)
    ring = np.ones(pixels.shape[:2], dtype=bool)
    ring[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    border = pixels[ring]
    ground = np.median(border, axis=0)
    if np.linalg.norm(border - ground, axis=1).mean() > _BORDER_SPREAD:
        return Reading()
    background = _nearest(ground, BACKGROUNDS)
    subject = _subject(pixels, ground)
    if subject is None:
        return Reading(background=background)
    mask, colour = subject
    # the shape that overlaps the mask best at the mask's area and centre, and its radius in pixels
    shape, radius, overlap = max(((name, *_fit(name, mask)) for name in ALL_OUTLINES), key=lambda fit: fit[2])
    if overlap < (_SMALLEST_RING_OVERLAP if shape == "ring" else _SMALLEST_OVERLAP):
        return Reading(background=background, colour=_nearest(colour, COLOURS))
    relative = radius / min(mask.shape)
    size = min(RADII, key=lambda name: abs(RADII[name] - relative))
    return Reading(shape=shape, colour=_nearest(colour, COLOURS), size=size, background=background)


def _nearest(colour: NDArray[np.float32], names: dict[str, Colour]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.asarray(names[name]))))


def _subject(
    pixels: NDArray[np.float32], ground: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]] | None:
    """Returns the subject's mask and colour, or None if next to nothing stands out from the ground."""
    distance = np.linalg.norm(pixels - ground, axis=2)
    strongest = np.quantile(distance, 1 - _SMALLEST_AREA)
    if strongest < 40:  # the two nearest colours of the grammar, red and orange, lie 108 apart
        return None
    colour = np.median(pixels[distance >= 0.85 * strongest], axis=0)
    along = (pixels - ground) @ (colour - ground) / np.sum((colour - ground) ** 2)
    mask = along > _CONTRAST
    return (mask, colour) if mask.mean() >= _SMALLEST_AREA else None


def _fit(shape: str, mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the radius of a shape of the mask's area and centre, in pixels, and its overlap with the mask."""
    area, y, x = _moments(mask.astype(np.float32))
    unit_area, unit_y, unit_x = _unit_moments(shape)
    radius = math.sqrt(area / unit_area)
    height, width = mask.shape
    template = coverage(
        ALL_OUTLINES[shape], height=height, width=width, y=y - unit_y * radius, x=x - unit_x * radius, radius=radius
    )
    drawn = template > 0.5
    union = (mask | drawn).sum()
    return radius, float((mask & drawn).sum() / union) if union else 0.0


def _moments(mask: NDArray[np.float32]) -> tuple[float, float, float]:
    """Returns area and centre of a mask, in pixels."""
    area = float(mask.sum())
    ys, xs = (np.arange(pixels, dtype=np.float32) + 0.5 for pixels in mask.shape)
    return area, float((mask.sum(axis=1) * ys).sum() / area), float((mask.sum(axis=0) * xs).sum() / area)


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """Returns area and centre of a shape of radius 1 about the origin."""
    radius = 100.0
    mask = coverage(ALL_OUTLINES[shape], height=400, width=400, y=200.0, x=200.0, radius=radius)
    area, y, x = _moments(mask)
    return area / radius**2, (y - 200) / radius, (x - 200) / radius
