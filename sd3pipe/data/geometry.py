"""What is cut out of a picture for one row: bucket, resized size, crop, flip and mask, and nothing else.

These are the fields that enter a row's key, so a changed option leaves all rows alone whose numbers it does not touch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sd3pipe.data.buckets import Placement, Size, place
from sd3pipe.data.dataset_file import Subset
from sd3pipe.data.faces import face_placement
from sd3pipe.data.filters import filter_name
from sd3pipe.data.scan import Picture, Scan, UnreadableFile
from sd3pipe.errors import UnreadablePicture
from sd3pipe.fingerprint import hash_json

RECIPE_VERSION = 1  # raised whenever this package makes other numbers from the same picture and recipe

_MOST_PIXELS = 200_000_000  # of a resized picture, as of a file

MaskSource = Literal["alpha", "picture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One row's view of a picture, in pixels: resize to `resized`, take `size` from (left, top), then maybe mirror."""

    resized: Size
    left: int
    top: int
    size: Size
    flip: bool
    resize_filter: str | None
    mask: MaskSource | None
    background: tuple[int, int, int] | None

    def recipe(self) -> dict[str, Any]:
        """Returns the JSON that stands for this cut in a row's key."""
        return {
            "resized": list(self.resized),
            "crop": [self.left, self.top, *self.size],
            "flip": self.flip,
            "filter": self.resize_filter,
            "mask": self.mask,
            "background": list(self.background) if self.background else None,
        }


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
        placement, left, top = _position(picture, partial(_random, picture, seed, crop))
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
            unreadable.append(
                UnreadableFile(
                    place=picture.place,
                    name=picture.name,
                    subset=picture.subset.name,
                    image_hash=picture.image_hash,
                    reason=str(error),
                )
            )
    return pictures, unreadable


def _random(picture: Picture, seed: int, crop: int) -> random.Random:
    return random.Random(int(hash_json(["crop", seed, picture.image_hash, crop])[:16], 16))


def _position(picture: Picture, draw: Callable[[], random.Random]) -> tuple[Placement, int, int]:
    """Returns how a picture is resized and where its cut begins; `draw` is called, once, if that is drawn."""
    bucketing, faces = picture.subset.bucketing, picture.subset.face_crop_aug_range
    size = (picture.width, picture.height)
    if faces is not None and not bucketing.enable_bucket:
        placed = face_placement(
            Path(picture.name).stem, size, bucketing, faces, random_crop=picture.subset.random_crop, rng=draw()
        )
        if placed is not None:
            return placed
    placement = place(*size, bucketing)
    covers = size[0] >= placement.bucket[0] and size[1] >= placement.bucket[1]
    if picture.subset.random_crop and not bucketing.enable_bucket and covers:
        placement = Placement(bucket=placement.bucket, resized=size)  # sd-scripts cuts from the full size then
    spare = [placement.resized[axis] - placement.bucket[axis] for axis in (0, 1)]
    if picture.subset.random_crop:
        rng = draw()
        left, top = (int(rng.random() * (rest + 1)) for rest in spare)
    else:
        left, top = (rest // 2 for rest in spare)
    return placement, left, top


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
