"""Bucket rules, case by case, against a second statement of the rule and against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd3pipe.data.buckets import bucket_sizes, cut_by_limit, place
from sd3pipe.data.dataset_file import Bucketing
from sd3pipe.errors import UnreadablePicture


def bucketing(side=1024, *, height=None, low=256, high=1024, steps=64, no_upscale=False, enable=True):
    return Bucketing(
        width=side, height=height or side, enable_bucket=enable, min_bucket_reso=low, max_bucket_reso=high,
        bucket_reso_steps=steps, bucket_no_upscale=no_upscale,
    )  # fmt: skip


def listed_rule(width, height, area, low, high, steps):
    """The list of sizes as a comprehension, the choice as numpy's argmin over it."""
    side = math.isqrt(area) // steps * steps
    pairs = [(w, min(high, area // w // steps * steps)) for w in range(low, high + 1, steps)]
    sizes = sorted({(side, side), *((a, b) for w, h in pairs if h >= low for a, b in ((w, h), (h, w)))})
    aspect = width / height
    ratios = np.array([w / h for w, h in sizes])
    bucket = (width, height) if (width, height) in sizes else sizes[int(np.abs(ratios - aspect).argmin())]
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return bucket, (math.floor(width * scale + 0.5), math.floor(height * scale + 0.5))


def no_upscale_rule(width, height, area, steps):
    """One side of the ideal size rounded, then floored to a step; the one with the smaller aspect error wins."""
    if width * height <= area:
        resized = (width, height)
    else:
        aspect = width / height
        ideal = math.sqrt(area * aspect)
        w, h = (math.floor(math.floor(side + 0.5) / steps) * steps for side in (ideal, area / ideal))
        h_for_w, w_for_h = (math.floor(math.floor(side + 0.5) / steps) * steps for side in (w / aspect, h * aspect))
        by_width = bool(h_for_w) and abs(w / h_for_w - aspect) < abs(w_for_h / h - aspect)
        resized = (w, math.floor(w / aspect + 0.5)) if by_width else (math.floor(h * aspect + 0.5), h)
    return tuple(side // steps * steps for side in resized), resized


SIZES = [
    (1024, 1024), (1920, 1080), (1080, 1920), (3000, 2000), (2000, 3000), (4032, 3024), (640, 480), (480, 640),
    (512, 512), (1, 4000), (4000, 1), (64, 64), (63, 63), (1023, 1025), (1025, 1023), (1024, 1023), (832, 1216),
    (1216, 832), (900, 300), (300, 900), (1500, 1000), (1365, 768), (768, 1365), (255, 257), (10000, 9999),
    (5616, 3744), (333, 777),
]  # fmt: skip
OPTIONS = [
    (1024, 256, 1024, 64), (1024, 256, 2048, 64), (1024, 256, 2048, 32), (512, 256, 1024, 64), (768, 320, 1536, 32),
    (512, 64, 512, 32),
]  # fmt: skip


@pytest.mark.parametrize("side, low, high, steps", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_listed_buckets_follow_the_rule(size, side, low, high, steps):
    placed = place(*size, bucketing(side, low=low, high=high, steps=steps))
    assert (placed.bucket, placed.resized) == listed_rule(*size, side * side, low, high, steps)


@pytest.mark.parametrize("side, low, high, steps", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_upscale_follows_the_rule(size, side, low, high, steps):
    options = bucketing(side, low=low, high=high, steps=steps, no_upscale=True)
    bucket, resized = no_upscale_rule(*size, side * side, steps)
    if min(bucket) < 1:
        with pytest.raises(UnreadablePicture, match="bucket_no_upscale"):
            place(*size, options)
        return
    placed = place(*size, options)
    assert (placed.bucket, placed.resized) == (bucket, resized)


BY_HAND = [  # size, options, bucket, resized
    ((1920, 1080), {}, (1024, 576), (1024, 576)),  # 16/9 = 1.778 = 1024/576; longer buckets end at 1024
    ((1920, 1080), {"high": 2048}, (1344, 768), (1365, 768)),  # 1344 x 768 = 1.75 is nearer than 1408 x 704 = 2
    ((1000, 1000), {}, (1024, 1024), (1024, 1024)),  # enlarged
    ((1024, 768), {}, (1024, 768), (1024, 768)),  # an exact size
    ((3000, 2000), {}, (1024, 704), (1056, 704)),  # 1.5: 1024/704 = 1.4545 (0.045) beats 1024/640 = 1.6 (0.1)
    ((1, 4000), {}, (256, 1024), (256, 1024000)),  # the narrowest bucket, its width matched
    ((4000, 1), {}, (1024, 256), (1024000, 256)),
    ((512, 512), {"side": 512}, (512, 512), (512, 512)),
    ((500, 400), {"no_upscale": True}, (448, 384), (500, 400)),  # not resized, cut down to steps
    ((2048, 2048), {"no_upscale": True}, (1024, 1024), (1024, 1024)),
    (
        (3000, 2000),
        {"no_upscale": True},
        (1216, 832),
        (1248, 832),
    ),  # ideal 1254 x 836; 832 high errs 0.038, 1216 wide 0.1
    ((640, 480), {"enable": False, "side": 512}, (512, 512), (683, 512)),  # one size for all: covered and cut
    ((300, 200), {"enable": False, "side": 512, "height": 768}, (512, 768), (1152, 768)),
]


@pytest.mark.parametrize("size, options, bucket, resized", BY_HAND)
def test_cases_worked_out_by_hand(size, options, bucket, resized):
    placed = place(*size, bucketing(**options))
    assert (placed.bucket, placed.resized) == (bucket, resized)


@pytest.mark.parametrize("options, count", [({}, 25), ({"high": 2048}, 41), ({"side": 512}, 17)])
def test_the_lists_have_sd_scripts_lengths(options, count):
    assert len(bucket_sizes(bucketing(**options))) == count


@pytest.mark.parametrize("size", [(1500, 1000), (750, 1000)], ids=str)
def test_a_tie_between_aspects_takes_the_first_of_the_sorted_list(size):
    """1.5 lies as far from 1 as from 2, 0.75 as far from 1 as from 0.5."""
    options = bucketing(1024, height=512, low=512, high=1024, steps=512)
    assert bucket_sizes(options) == ((512, 512), (512, 1024), (1024, 512))
    assert place(*size, options).bucket == (512, 512)


def test_max_bucket_reso_is_told_where_it_costs_pixels():
    wide = bucketing()
    assert cut_by_limit(place(1920, 1080, wide).bucket, wide)
    assert not cut_by_limit(place(1024, 1024, wide).bucket, wide)
    roomy = bucketing(high=2048)
    assert not cut_by_limit(place(1920, 1080, roomy).bucket, roomy)


@given(
    width=st.integers(1, 20000),
    height=st.integers(1, 20000),
    side=st.sampled_from([256, 512, 768, 1024]),
    steps=st.sampled_from([32, 64]),
    no_upscale=st.booleans(),
)
def test_every_cut_lies_inside_the_resized_picture(width, height, side, steps, no_upscale):
    options = bucketing(side, low=64, high=2048, steps=steps, no_upscale=no_upscale)
    try:
        placed = place(width, height, options)
    except UnreadablePicture:
        assert no_upscale
        return
    assert placed.resized[0] >= placed.bucket[0] and placed.resized[1] >= placed.bucket[1]
    assert placed.bucket[0] % steps == placed.bucket[1] % steps == 0
    assert placed.bucket[0] * placed.bucket[1] <= side * side
    if no_upscale:
        assert placed.resized[0] <= width + 1 and placed.resized[1] <= height + 1
