"""Which size a picture is trained at, and how it gets there: sd-scripts' rules, picture by picture.

Reference: sd-scripts revision 48d368fa, its bucket manager. All arithmetic is in double precision in the same order, so
that ties fall the same way.
"""

import functools
import math
from dataclasses import dataclass

from sd3pipe.data.cut import Size
from sd3pipe.data.dataset_file import Bucketing
from sd3pipe.errors import UnreadablePicture

_MUCH_SMALLER = 0.8  # of the area asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A picture is resized to `resized` and cut to `bucket`; both are (width, height) in pixels."""

    bucket: Size
    resized: Size


@functools.lru_cache(maxsize=65536)
def place(width: int, height: int, bucketing: Bucketing) -> Placement:
    """Returns where a picture of this size (after EXIF orientation) goes. Raises UnreadablePicture."""
    if bucketing.enable_bucket and bucketing.bucket_no_upscale:
        area, step = bucketing.width * bucketing.height, bucketing.bucket_reso_steps
        resized = _shrunk(width / height, area, step) if width * height > area else (width, height)
        placement = Placement(bucket=(resized[0] - resized[0] % step, resized[1] - resized[1] % step), resized=resized)
    else:
        sizes, aspect, bucket = bucket_sizes(bucketing), width / height, (width, height)
        if bucket not in sizes:  # the nearest aspect ratio, the first of equals
            bucket = min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))
        scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width  # covers it
        placement = Placement(bucket=bucket, resized=(int(width * scale + 0.5), int(height * scale + 0.5)))
    if min(placement.bucket) < 1:
        raise UnreadablePicture(
            f"{width} x {height} pixels: a side would be shorter than bucket_reso_steps = "
            f"{bucketing.bucket_reso_steps}, and bucket_no_upscale forbids to enlarge it"
        )
    return placement


@functools.cache
def bucket_sizes(bucketing: Bucketing) -> tuple[Size, ...]:
    """Returns the list of bucket sizes, sorted: with the area of the resolution at the most, in steps."""
    if not bucketing.enable_bucket:
        return ((bucketing.width, bucketing.height),)
    area, step = bucketing.width * bucketing.height, bucketing.bucket_reso_steps
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for side in range(bucketing.min_bucket_reso, bucketing.max_bucket_reso + 1, step):
        other = min(bucketing.max_bucket_reso, area // side // step * step)
        if other >= bucketing.min_bucket_reso:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def cut_by_limit(size: Size, bucketing: Bucketing) -> bool:
    """Whether max_bucket_reso makes a picture train well below the resolution's area: 16:9 at 1024 squared, say."""
    width, height = size
    listed = bucketing.enable_bucket and not bucketing.bucket_no_upscale
    too_small = width * height < _MUCH_SMALLER * bucketing.width * bucketing.height
    return listed and too_small and max(width, height) == bucketing.max_bucket_reso


def _shrunk(aspect: float, area: int, step: int) -> Size:
    """Shrinks to the area, one side to a multiple of the step; what stands over on the other is cut."""
    ideal_width = math.sqrt(area * aspect)
    by_width = _floor_to_step(ideal_width, step)
    by_height = _floor_to_step(area / ideal_width, step)
    errors = (
        _aspect_error(by_width, _floor_to_step(by_width / aspect, step), aspect),
        _aspect_error(_floor_to_step(by_height * aspect, step), by_height, aspect),
    )
    if errors[0] < errors[1]:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _aspect_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf  # sd-scripts divides by zero here


def _floor_to_step(value: float, step: int) -> int:
    rounded = int(value + 0.5)
    return rounded - rounded % step
