"""What is cut out of a picture for one row: bucket, resized size, crop, flip and mask, and nothing else.

These are the fields that enter a row's key, so a changed option leaves all rows alone whose numbers it does not touch.
"""

import random
from dataclasses import dataclass

from sd3pipe.data.buckets import Placement, place
from sd3pipe.data.cut import Cut, MaskSource, Size
from sd3pipe.data.dataset_file import Subset
from sd3pipe.data.folders import FACE_PARTS
from sd3pipe.data.scan import Picture, Scan, UnreadableFile
from sd3pipe.errors import UnreadablePicture
from sd3pipe.fingerprint import hash_json

RECIPE_VERSION = 1  # raised whenever this package makes other numbers from the same picture and recipe

_MOST_PIXELS = 200_000_000  # of a resized picture, as of a file

_SAME_FILTERS = {"linear": "bilinear", "cubic": "bicubic"}

Face = tuple[int, int, int, int]  # centre x, centre y, width, height
Position = tuple[Placement, int, int]  # and the cut's left and top in the resized picture


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One row of a picture: a cut with its place among the picture's cuts."""

    picture: Picture
    crop: int
    flip: int
    cut: Cut


def views(picture: Picture, *, crop_variants: int, seed: int) -> list[View]:
    """Returns every row that a picture gives: crops x flips. Raises UnreadablePicture.

    Random crops (random_crop, face_crop_aug_range) give `crop_variants` rows, a function of (seed, picture, number).
    """
    found = []
    crops, flips = cut_counts(picture.subset, crop_variants=crop_variants)
    for crop in range(crops):
        placement, left, top = _position(picture, seed, crop)
        if placement.resized[0] * placement.resized[1] > _MOST_PIXELS:
            raise UnreadablePicture(
                f"{picture.width} x {picture.height} pixels: to cover the bucket it would have to be enlarged to "
                f"{placement.resized[0]} x {placement.resized[1]}"
            )
        for flip in range(flips):
            found.append(
                View(picture=picture, crop=crop, flip=flip, cut=_cut(picture, placement, left, top, bool(flip)))
            )
    return found


def cut_counts(subset: Subset, *, crop_variants: int) -> tuple[int, int]:
    """Returns how many crops a picture of a subset gives, and how many rows each crop."""
    faces = subset.face_crop_aug_range is not None and not subset.bucketing.enable_bucket
    return crop_variants if subset.random_crop or faces else 1, 1 + subset.flip_aug


def views_of_all(found: Scan, *, crop_variants: int, seed: int) -> tuple[list[list[View]], list[UnreadableFile]]:
    """Returns the rows of each picture in the order of the scan, and the files that give none."""
    pictures, unreadable = [], list(found.unreadable)
    for picture in found.pictures:
        try:
            pictures.append(views(picture, crop_variants=crop_variants, seed=seed))
        except UnreadablePicture as error:
            unreadable.append(UnreadableFile.of(picture, str(error)))
    return pictures, unreadable


def filter_name(width: int, height: int, size: Size, interpolation: str | None) -> str:
    """Returns the filter that brings a picture to `size`; it enters the key of a row.

    Without an `interpolation`, a picture that shrinks or stays on both sides is averaged over areas, any other goes
    through Lanczos. As soon as one side grows, OpenCV's area is another filter than its name says: area-blend.
    """
    grows = width < size[0] or height < size[1]
    if interpolation is None:
        return "lanczos" if grows else "area"
    if interpolation == "area" and grows:
        return "area-blend"
    return _SAME_FILTERS.get(interpolation, interpolation)


def face_in_name(stem: str) -> Face | None:
    """Returns the face that a file name without ending tells of, or None."""
    parts = stem.split("_")
    if len(parts) <= FACE_PARTS or not all(part.isdecimal() and part.isascii() for part in parts[-FACE_PARTS:]):
        return None
    x, y, width, height = (int(part) for part in parts[-FACE_PARTS:])
    return (x, y, width, height) if x and y and width and height else None


def _generator(picture: Picture, seed: int, crop: int) -> random.Random:
    return random.Random(int(hash_json(["crop", seed, picture.image_hash, crop])[:16], 16))


def _position(picture: Picture, seed: int, crop: int) -> Position:
    """Returns how a picture is resized and where its cut begins, drawn where the subset asks for it."""
    bucketing = picture.subset.bucketing
    size = (picture.width, picture.height)
    if picture.subset.face_crop_aug_range is not None and not bucketing.enable_bucket:
        placed = _around_face(picture, picture.subset.face_crop_aug_range, _generator(picture, seed, crop))
        if placed is not None:
            return placed
    placement = place(*size, bucketing)
    covers = size[0] >= placement.bucket[0] and size[1] >= placement.bucket[1]
    if picture.subset.random_crop and not bucketing.enable_bucket and covers:
        placement = Placement(bucket=placement.bucket, resized=size)  # sd-scripts cuts from the full size then
    spare = [placement.resized[axis] - placement.bucket[axis] for axis in (0, 1)]
    if picture.subset.random_crop:
        rng = _generator(picture, seed, crop)
        left, top = (int(rng.random() * (rest + 1)) for rest in spare)
    else:
        left, top = (rest // 2 for rest in spare)
    return placement, left, top


def _around_face(picture: Picture, face_range: tuple[float, float], rng: random.Random) -> Position | None:
    """Returns the position for a picture with a face in its name and enough pixels, else None.

    The picture shrinks so that the face fills between 1/high and 1/low of the shorter side of the target, as far as the
    picture still covers the target, and is cut with the face near the middle: sd-scripts' face crop at 48d368fa.
    """
    face = face_in_name(picture.place.stem)
    size, target = (picture.width, picture.height), (picture.subset.bucketing.width, picture.subset.bucketing.height)
    if face is None or size[0] < target[0] or size[1] < target[1]:
        return None
    if size == target:
        return Placement(bucket=target, resized=target), 0, 0
    face_px, shorter = max(face[2:]), min(target)
    covering = max(target[0] / size[0], target[1] / size[1])
    scale = min(1.0, max(covering, shorter / (face_px * face_range[1])))
    largest = min(1.0, max(scale, shorter / (face_px * face_range[0])))
    if scale < largest:
        scale += rng.random() * (largest - scale)
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    moves = face_range[0] != face_range[1] and face_px > shorter // 10 and face_px >= 40
    offsets = []
    for axis in (1, 0):  # sd-scripts draws for the height first
        centre = int(face[axis] * scale + 0.5)
        shift = 0  # from the face's centre: far with random_crop, else a twentieth of the face
        if picture.subset.random_crop:
            reach = max(resized[axis] - centre, centre)
            shift = _whole(0, reach, rng) + _whole(0, reach, rng) - reach
        elif moves:
            shift = _whole(-face_px // 20, face_px // 20, rng)
        offsets.append(max(0, min(centre - target[axis] // 2 + shift, resized[axis] - target[axis])))
    return Placement(bucket=target, resized=resized), offsets[1], offsets[0]


def _whole(low: int, high: int, rng: random.Random) -> int:
    return low + int(rng.random() * (high - low + 1))


def _cut(picture: Picture, placement: Placement, left: int, top: int, flip: bool) -> Cut:
    subset = picture.subset
    mask: MaskSource | None = None
    if picture.mask_hash is not None:
        mask = "picture"
    elif subset.alpha_mask:
        mask = "alpha"
    size = (picture.width, picture.height)
    resized = placement.resized != size
    return Cut(
        resized=placement.resized,
        left=left,
        top=top,
        size=placement.bucket,
        flip=flip,
        resize_filter=filter_name(*size, placement.resized, subset.resize_interpolation) if resized else None,
        mask=mask,
        background=subset.alpha_background if picture.has_alpha else None,
    )
