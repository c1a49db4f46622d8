"""The hand-written measure: right on true drawings, silent on noise and on pictures outside the grammar."""

import numpy as np
import pytest

from sd3pipe.demo.drawings import NEW_WORD, OUTLINES, Subject, all_subjects, draw
from sd3pipe.demo.measure import Reading, read_picture

FIELDS = ("shape", "colour", "size", "background")
SIZES = ((64, 64), (64, 96), (96, 64))


def drawn(count, shapes, seed):
    generator = np.random.default_rng(seed)
    subjects = all_subjects(shapes)
    for number, chosen in enumerate(generator.permutation(len(subjects))[:count]):
        height, width = SIZES[number % len(SIZES)]
        yield subjects[chosen], draw(subjects[chosen], height=height, width=width, generator=generator)


@pytest.mark.long
@pytest.mark.parametrize("shapes", [tuple(OUTLINES), (NEW_WORD,)])
def test_true_drawings_are_read_right(shapes):
    wrong = dict.fromkeys(FIELDS, 0)
    count = 0
    for subject, picture in drawn(200, shapes, seed=1):
        reading = read_picture(picture)
        count += 1
        for field in FIELDS:
            wrong[field] += getattr(reading, field) != getattr(subject, field)
    assert count >= 100
    assert max(wrong.values()) <= 0.01 * count, wrong


@pytest.mark.long
def test_blurred_and_grainy_drawings_are_read_right():
    """A VAE softens edges and shifts colours a little; the measure must not mind."""
    generator = np.random.default_rng(2)
    wrong = dict.fromkeys(FIELDS, 0)
    for subject, picture in drawn(100, (*OUTLINES, NEW_WORD), seed=3):
        soft = picture.astype(np.float32)
        soft = (soft + sum(np.roll(soft, shift, axis) for axis in (0, 1) for shift in (-1, 1))) / 5
        soft = (soft + generator.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        reading = read_picture(soft)
        for field in FIELDS:
            wrong[field] += getattr(reading, field) != getattr(subject, field)
    assert max(wrong.values()) <= 0.03 * 100, wrong


def test_noise_shows_nothing():
    generator = np.random.default_rng(4)
    for _ in range(20):
        assert read_picture(generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)) == Reading()


def test_an_empty_picture_shows_its_background_alone():
    grey = np.full((64, 64, 3), (135, 138, 142), dtype=np.uint8)
    assert read_picture(grey) == Reading(background="grey")


def test_shapeless_blotches_are_no_shape_of_the_grammar():
    """Two far-apart bars overlap no single shape well."""
    picture = np.full((64, 64, 3), 246, dtype=np.uint8)
    picture[6:58, 4:12] = picture[6:58, 52:60] = (214, 38, 40)
    reading = read_picture(picture)
    assert reading.shape is None
    assert reading.background == "white"


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_subject_is_told_apart(field):
    subject = Subject(shape="square", colour="red", size="large", background="white")
    others = {"shape": "circle", "colour": "blue", "size": "small", "background": "grey"}
    other = Subject(**{name: others[name] if name == field else getattr(subject, name) for name in FIELDS})
    reading = read_picture(draw(other, height=64, width=64, generator=np.random.default_rng(5)))
    assert getattr(reading, field) == others[field]
