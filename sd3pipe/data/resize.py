"""Resizing as sd-scripts does it: Pillow for Lanczos and box, and OpenCV's other filters rebuilt here with numpy.

Each filter is a pair of matrices, one per axis, with few non-zero numbers in a row, so it is applied in blocks of rows
by dense products of small matrices. Differences from OpenCV: at most one level, where a sum in single precision (or,
for linear and cubic, OpenCV's 11-bit weights) falls on the other side of a half.
"""

# H W pixels, C channels

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_BLOCK_ROWS = 8  # of 4 to 64 the fastest but one: large blocks multiply zeros, small ones are many calls
_CUBIC = -0.75  # OpenCV's coefficient; Pillow's is -0.5


def resize(pixels_HWC: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Returns uint8 pixels at `size` (width, height) through a filter that `filter_name` gave."""
    height, width = pixels_HWC.shape[:2]
    if name in _PILLOW:
        return np.asarray(Image.fromarray(pixels_HWC).resize(size, _PILLOW[name]))
    if name == "nearest":
        return pixels_HWC[_nearest(height, size[1])[:, None], _nearest(width, size[0])]
    channels = pixels_HWC.shape[2] if pixels_HWC.ndim == 3 else 1
    rows = pixels_HWC.reshape(height, width * channels)
    tall = np.empty((size[1], width * channels), np.float32)
    for block in _blocks(height, size[1], name):  # some rows at a time as float32, which stay in the core's own memory
        part = rows[block.first : block.last].astype(np.float32)
        np.matmul(block.weights, part, out=tall[block.start : block.stop])
    done = np.empty((size[1], size[0] * channels), np.float32)
    for block, weights in _blocks_per_channel(width, size[0], name, channels):
        part = tall[:, block.first * channels : block.last * channels]
        np.matmul(part, weights, out=done[:, block.start * channels : block.stop * channels])
    half_up = name == "area" and width == 2 * size[0] and height == 2 * size[1]  # OpenCV's 2 x 2 case, in integers
    whole = np.floor(done + np.float32(0.5)) if half_up else np.rint(done)
    return np.clip(whole, 0, 255).astype(np.uint8).reshape(size[1], size[0], *pixels_HWC.shape[2:])


def area_mean(values_HW: np.ndarray, factor: int) -> np.ndarray:
    """Returns the means of factor x factor squares as float32; sides must be multiples of the factor."""
    height, width = values_HW.shape
    squares = values_HW.reshape(height // factor, factor, width // factor, factor)
    return squares.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of a filter matrix: outputs start..stop come from inputs first..last through `weights`."""

    start: int
    stop: int
    first: int
    last: int
    weights: np.ndarray


@functools.lru_cache(maxsize=64)
def _blocks(source: int, target: int, name: str) -> tuple[_Block, ...]:
    """Returns the matrix of one axis in blocks of rows, each only as wide as it must be."""
    blocks = []
    for start in range(0, target, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, target)
        taps = [_TAPS[name](source, target, row) for row in range(start, stop)]
        first = min(index for row in taps for index, _ in row)
        last = max(index for row in taps for index, _ in row) + 1
        weights = np.zeros((stop - start, last - first), np.float32)
        for number, row in enumerate(taps):
            for index, weight in row:
                weights[number, index - first] += weight
        blocks.append(_Block(start, stop, first, last, weights))
    return tuple(blocks)


@functools.lru_cache(maxsize=64)
def _blocks_per_channel(source: int, target: int, name: str, channels: int) -> list[tuple[_Block, np.ndarray]]:
    """Returns the blocks of one axis with transposed weights for values whose channels lie side by side."""
    each = np.eye(channels, dtype=np.float32)
    return [(block, np.kron(block.weights.T, each)) for block in _blocks(source, target, name)]


def _area_taps(source: int, target: int, row: int) -> list[tuple[int, float]]:
    """Returns the inputs that output `row` covers, each with the covered share."""
    begin, end = row * source / target, min((row + 1) * source / target, source)
    taps = []
    for index in range(math.floor(begin), math.ceil(end)):
        covered = min(index + 1, end) - max(index, begin)
        if covered > 1e-9:
            taps.append((index, covered / (end - begin)))
    return taps


def _blend_taps(source: int, target: int, row: int) -> list[tuple[int, float]]:
    """Returns what OpenCV does on both axes under the name of area as soon as one of them is enlarged."""
    index = row * source // target
    share = (row + 1) - (index + 1) * target / source
    share = share - math.floor(share) if share > 0 else 0.0
    return _clamped([(index, 1 - share), (index + 1, share)], source)


def _bilinear_taps(source: int, target: int, row: int) -> list[tuple[int, float]]:
    """Returns the two neighbours of the output's centre: OpenCV does not widen the filter when shrinking."""
    centre = (row + 0.5) * source / target - 0.5
    index = math.floor(centre)
    share = centre - index
    return _clamped([(index, 1 - share), (index + 1, share)], source)


def _bicubic_taps(source: int, target: int, row: int) -> list[tuple[int, float]]:
    centre = (row + 0.5) * source / target - 0.5
    index = math.floor(centre)
    x = centre - index
    first = ((_CUBIC * (x + 1) - 5 * _CUBIC) * (x + 1) + 8 * _CUBIC) * (x + 1) - 4 * _CUBIC
    second = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    third = ((_CUBIC + 2) * (1 - x) - (_CUBIC + 3)) * (1 - x) * (1 - x) + 1
    weights = (first, second, third, 1 - first - second - third)
    return _clamped([(index - 1 + number, weight) for number, weight in enumerate(weights)], source)


def _clamped(taps: list[tuple[int, float]], source: int) -> list[tuple[int, float]]:
    """Returns taps beyond the border as taps on the border."""
    return [(min(max(index, 0), source - 1), weight) for index, weight in taps]


def _nearest(source: int, target: int) -> np.ndarray:
    """Returns the input under the centre of each output, as OpenCV's INTER_NEAREST_EXACT and Pillow choose it."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


_TAPS = {"area": _area_taps, "area-blend": _blend_taps, "bilinear": _bilinear_taps, "bicubic": _bicubic_taps}
