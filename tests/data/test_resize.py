"""Resizing: OpenCV's area, linear and cubic rebuilt within one level, Pillow's Lanczos as it is."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd3pipe.data.geometry import filter_name
from sd3pipe.data.resize import area_mean, resize

Y, X = np.mgrid[0:9, 0:12]
PATTERN = ((X * 37 + Y * 91 + X * Y * 13) % 256).astype(np.uint8)

OPENCV = [  # what OpenCV 4.11.0 makes of PATTERN: filter, (width, height), rows of levels
    (
        "area",
        (5, 4),
        [
            "90 135 146 109 107",
            "124 142 142 133 98",
            "111 149 129 144 110",
            "165 146 144 162 172",
        ],
    ),
    (
        "area",
        (6, 3),
        [
            "116 131 145 117 132 104",
            "110 160 124 132 139 104",
            "146 146 146 146 146 146",
        ],
    ),
    (
        "area-blend",
        (13, 4),
        [
            "51 91 132 172 118 111 151 145 119 124 57 98 139",
            "72 138 132 184 136 144 167 119 86 151 174 26 92",
            "179 87 114 195 153 145 112 103 175 178 120 190 46",
            "115 231 134 207 171 195 185 175 199 156 213 137 227",
        ],
    ),
    (
        "bilinear",
        (5, 4),
        [
            "88 181 145 157 105",
            "90 214 175 113 36",
            "94 221 124 229 145",
            "185 193 154 114 152",
        ],
    ),
    (
        "bicubic",
        (7, 5),
        [
            "39 135 105 179 77 45 134",
            "192 59 155 162 99 255 63",
            "149 27 210 62 194 131 125",
            "83 26 219 147 84 37 66",
            "178 206 58 134 206 236 195",
        ],
    ),
]


def numbers(rows):
    return np.array([[int(level) for level in row.split()] for row in rows])


@pytest.mark.parametrize("name, size, levels", OPENCV, ids=lambda value: value if isinstance(value, str) else "")
def test_filters_are_opencvs_within_one_level(name, size, levels):
    ours = resize(PATTERN[..., None], size, name)[..., 0].astype(int)
    assert np.abs(ours - numbers(levels)).max() <= 1


def test_halving_both_sides_rounds_halves_up_as_opencv():
    halves = ((X[:8] * 37 + Y[:8] * 91) % 256).astype(np.uint8)
    rows = ["64 138 148 94 104 178", "118 64 138 148 94 104", "172 118 64 138 148 94", "98 172 118 64 138 148"]
    assert np.array_equal(resize(halves[..., None], (6, 4), "area")[..., 0], numbers(rows))


def exact_area(pixels_HW, width, height):
    """The mean over each output's area in rational numbers."""
    rows, columns = pixels_HW.shape

    def shares(source, target, index):
        begin, end = Fraction(index * source, target), Fraction((index + 1) * source, target)
        return [max(Fraction(0), min(end, i + 1) - max(begin, Fraction(i))) / (end - begin) for i in range(source)]

    across = [shares(columns, width, index) for index in range(width)]
    down = [shares(rows, height, index) for index in range(height)]

    def mean(left, right):
        weights = ((a * b, int(pixels_HW[y, x])) for y, a in enumerate(left) if a for x, b in enumerate(right) if b)
        return float(sum(weight * level for weight, level in weights))

    return [[mean(left, right) for right in across] for left in down]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_area_is_the_mean_over_the_area(rows, columns, data, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    width, height = data.draw(st.integers(1, columns)), data.draw(st.integers(1, rows))
    ours = resize(np.repeat(pixels[..., None], 3, axis=2), (width, height), "area")
    assert np.abs(ours[..., 1] - np.array(exact_area(pixels, width, height))).max() <= 0.5001


@pytest.mark.parametrize("name, filter", [("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)])
def test_lanczos_and_box_are_pillows(name, filter):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(resize(pixels, (41, 17), name), np.asarray(Image.fromarray(pixels).resize((41, 17), filter)))


def test_nearest_takes_the_pixel_under_the_centre():
    pixels = np.arange(10, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    assert resize(pixels, (5, 1), "nearest")[0, :, 0].tolist() == [1, 3, 5, 7, 9]
    assert resize(pixels, (20, 1), "nearest")[0, :, 0].tolist() == [n // 2 for n in range(20)]


@pytest.mark.parametrize("name", ["area", "area-blend", "bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_plain_colour_stays_what_it_is(name, channels):
    pixels = np.full((37, 53, channels), 255, np.uint8)
    pixels[..., 0] = 77
    assert (resize(pixels, (29, 31), name) == pixels[0, 0]).all()


def test_the_default_filter_depends_on_which_way_it_goes():
    assert filter_name(100, 100, (100, 50), None) == "area"
    assert filter_name(100, 100, (101, 50), None) == "lanczos"
    assert filter_name(100, 100, (50, 50), "linear") == filter_name(100, 100, (50, 50), "bilinear") == "bilinear"
    assert filter_name(100, 100, (200, 50), "area") == "area-blend"


def test_area_mean_averages_squares():
    values = np.zeros((16, 8), np.uint8)
    values[:4] = 255
    assert area_mean(values, 8).tolist() == [[127.5], [0.0]]
