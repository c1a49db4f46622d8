"""Cuts around faces, whose place the file name tells: NAME_centrex_centrey_width_height, in pixels of the picture.

Reference: sd-scripts revision 48d368fa, its face crop (buckets off, face_crop_aug_range given).
"""

import random

from sd3pipe.data.buckets import Placement, Size
from sd3pipe.data.dataset_file import Bucketing

Face = tuple[int, int, int, int]  # centre x, centre y, width, height
_FIELDS = 4


def face_in_name(stem: str) -> Face | None:
    """Returns the face that a file name without ending tells of, or None."""
    parts = stem.split("_")
    if len(parts) <= _FIELDS or not all(part.isdecimal() and part.isascii() for part in parts[-_FIELDS:]):
        return None
    x, y, width, height = (int(part) for part in parts[-_FIELDS:])
    return (x, y, width, height) if x and y and width and height else None


def face_placement(
    stem: str,
    size: Size,
    bucketing: Bucketing,
    face_range: tuple[float, float],
    *,
    random_crop: bool,
    rng: random.Random,
) -> tuple[Placement, int, int] | None:
    """Returns (placement, left, top) for a picture with a face in its name and enough pixels, else None.

    The picture shrinks so that the face fills between 1/high and 1/low of the shorter side of the target, as far as the
    picture still covers the target, and is cut with the face near the middle.
    """
    face = face_in_name(stem)
    target = (bucketing.width, bucketing.height)
    if face is None or size[0] < target[0] or size[1] < target[1]:
        return None
    if size == target:
        return Placement(bucket=target, resized=target), 0, 0
    face_px = max(face[2], face[3])
    scale = _scale(size, target, face_px, face_range, rng)
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    offsets = []
    for axis in (1, 0):  # sd-scripts draws for the height first
        centre = int(face[axis] * scale + 0.5)
        shift = _shift(resized[axis], centre, face_px, target, face_range, random_crop, rng)
        offsets.append(max(0, min(centre - target[axis] // 2 + shift, resized[axis] - target[axis])))
    return Placement(bucket=target, resized=resized), offsets[1], offsets[0]


def _scale(size: Size, target: Size, face_px: int, face_range: tuple[float, float], rng: random.Random) -> float:
    shorter = min(target)
    covering = max(target[0] / size[0], target[1] / size[1])
    smallest = min(1.0, max(covering, shorter / (face_px * face_range[1])))
    largest = min(1.0, max(smallest, shorter / (face_px * face_range[0])))
    return smallest if smallest >= largest else smallest + rng.random() * (largest - smallest)


def _shift(
    length: int,
    centre: int,
    face_px: int,
    target: Size,
    face_range: tuple[float, float],
    random_crop: bool,
    rng: random.Random,
) -> int:
    """Returns how far the cut moves from the face's centre: far with random_crop, else a twentieth of the face."""
    if random_crop:
        reach = max(length - centre, centre)
        return _whole(0, reach, rng) + _whole(0, reach, rng) - reach
    if face_range[0] != face_range[1] and face_px > min(target) // 10 and face_px >= 40:
        return _whole(-face_px // 20, face_px // 20, rng)
    return 0


def _whole(low: int, high: int, rng: random.Random) -> int:
    return low + int(rng.random() * (high - low + 1))
