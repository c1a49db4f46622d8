"""Drawings of one shape on a plain background, and the captions that describe them, all made by code.

The grammar is small on purpose: SIZE COLOUR SHAPE on BACKGROUND. Every caption says all four, in one of three
wordings, so that a picture can be measured against its prompt (sd3pipe.demo.measure).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 38, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 65),
    "blue": (40, 80, 215),
    "purple": (140, 50, 175),
    "black": (22, 22, 26),
    "white": (246, 246, 242),
}
BACKGROUNDS: dict[str, Colour] = {**COLOURS, "grey": (135, 138, 142)}
RADII: dict[str, float] = {"small": 0.25, "large": 0.38}  # of the picture's shorter side, before jitter

_SUPERSAMPLING = 4
_COLOUR_JITTER = 8  # levels of 255
_RADIUS_JITTER = 0.06
_PLACE_JITTER = 0.05  # of each side

Coordinates = NDArray[np.floating]
Outline = Callable[[Coordinates, Coordinates], NDArray[np.bool_]]


# Each outline says which points belong to the shape; the shape fills about [-1, 1] x [-1, 1], y grows downwards.
OUTLINES: dict[str, Outline] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.86,
    "triangle": lambda x, y: (y <= 0.8) & (np.abs(x) <= (y + 1) * 0.56),
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.52**2),
    "diamond": lambda x, y: np.abs(x) * 1.35 + np.abs(y) <= 1.1,
}
NEW_WORD = "wubble"  # the base has never met the word, nor the shape: an hourglass
ALL_OUTLINES: dict[str, Outline] = {
    **OUTLINES,
    NEW_WORD: lambda x, y: (np.abs(y) <= 0.92) & (np.abs(x) <= 0.2 + 0.72 * np.abs(y)),
}
WORDINGS = (
    "a {size} {colour} {shape} on a {background} background",
    "{colour} {shape}, {size}, {background} background",
    "a {background} picture with a {size} {colour} {shape}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a drawing shows, in the words of the grammar."""

    shape: str
    colour: str
    size: str
    background: str

    def caption(self, wording: int = 0) -> str:
        """Returns the caption in one of the wordings."""
        return WORDINGS[wording].format(
            shape=self.shape, colour=self.colour, size=self.size, background=self.background
        )


def all_subjects(shapes: tuple[str, ...] = tuple(OUTLINES)) -> list[Subject]:
    """Returns every subject whose colour differs from its background, in a fixed order."""
    return [
        Subject(shape=shape, colour=colour, size=size, background=background)
        for shape, colour, size, background in product(shapes, COLOURS, RADII, BACKGROUNDS)
        if colour != background
    ]


def coverage(outline: Outline, *, height: int, width: int, y: float, x: float, radius: float) -> NDArray[np.float32]:
    """Returns how much of each pixel the shape covers, 0 to 1, [height, width]; places and radius are in pixels."""
    ys, xs = (
        (np.arange(pixels * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING for pixels in (height, width)
    )
    inside = outline((xs[None, :] - x) / radius, (ys[:, None] - y) / radius)
    fine = inside.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
    return fine.mean(axis=(1, 3), dtype=np.float32)


def paint(mask: NDArray[np.float32], colour: NDArray[np.float32], background: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns the picture [height, width, 3] of a colour laid over a background through a coverage mask."""
    blend = mask[..., None]
    return np.rint(blend * colour + (1 - blend) * background).clip(0, 255).astype(np.uint8)


def draw(
    subject: Subject, *, height: int, width: int, generator: np.random.Generator, outline: Outline | None = None
) -> NDArray[np.uint8]:
    """Returns a drawing of the subject; place, radius and both colours vary a little with the generator.

    `outline` is drawn instead of the subject's shape, for one that the grammar has no word for.
    """
    radius = RADII[subject.size] * min(height, width) * generator.uniform(1 - _RADIUS_JITTER, 1 + _RADIUS_JITTER)
    y, x = (_place(pixels, radius, generator) for pixels in (height, width))
    shape = outline or ALL_OUTLINES[subject.shape]
    mask = coverage(shape, height=height, width=width, y=y, x=x, radius=radius)
    return paint(mask, shade(BACKGROUNDS[subject.colour], generator), shade(BACKGROUNDS[subject.background], generator))


def _place(pixels: int, radius: float, generator: np.random.Generator) -> float:
    """Returns a coordinate near the middle at which a shape of this radius stays inside the picture."""
    jitter = min(_PLACE_JITTER * pixels, pixels / 2 - radius - 1)
    return pixels / 2 + float(generator.uniform(-jitter, jitter))


def shade(colour: Colour, generator: np.random.Generator) -> NDArray[np.float32]:
    """Returns a colour that varies a little with the generator."""
    return (np.asarray(colour) + generator.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, 3)).astype(np.float32)
