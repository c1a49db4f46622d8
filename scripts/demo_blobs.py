"""Random outlines beyond the grammar of the demo's drawings, from which its VAE and its judge model learn."""

import numpy as np
from numpy.typing import NDArray

from sd3pipe.demo.drawings import BACKGROUNDS, Coordinates, Outline, coverage, paint, shade


def blob_outline(generator: np.random.Generator) -> Outline:
    """Returns the outline of a random blob, round or with corners."""
    corners = int(generator.integers(3, 9))
    radii = generator.uniform(0.35, 1.0, corners)
    smooth = bool(generator.integers(2))

    def outline(x: Coordinates, y: Coordinates) -> NDArray[np.bool_]:
        turns = (np.arctan2(y, x) / (2 * np.pi) % 1.0) * corners
        before = np.floor(turns).astype(int) % corners
        part = turns % 1.0
        part = part * part * (3 - 2 * part) if smooth else part
        return np.hypot(x, y) <= radii[before] * (1 - part) + radii[(before + 1) % corners] * part

    return outline


def draw_blob(*, height: int, width: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Returns a random blob in random colours: from these a VAE learns outlines beyond the grammar's shapes."""
    outline = blob_outline(generator)
    radius = generator.uniform(0.15, 0.48) * min(height, width)
    y, x = (pixels * generator.uniform(0.3, 0.7) for pixels in (height, width))
    mask = coverage(outline, height=height, width=width, y=y, x=x, radius=radius)
    names = list(BACKGROUNDS)
    colour, background = (
        shade(BACKGROUNDS[names[i]], generator) for i in generator.choice(len(names), 2, replace=False)
    )
    return paint(mask, colour, background)
