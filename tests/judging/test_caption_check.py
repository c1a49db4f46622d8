"""Which captions are named, on made up errors: wrong ones, useless ones, and none by chance."""

import numpy as np

from sd3pipe.judging.bootstrap import resample
from sd3pipe.judging.caption_check import (
    advantages,
    change_nothing,
    gains,
    gap,
    other_captions,
    suspects,
    what_was_learnt,
)

PICTURES, OTHERS, NOISES = 24, 8, 12


def errors(generator, wrong=(), noise=0.01):
    """Returns errors under own, empty and other captions; the own caption explains 10 % unless it is wrong."""
    own = 0.9 + noise * generator.standard_normal((PICTURES, NOISES))
    own[list(wrong)] += 0.1
    others = 1.0 + noise * generator.standard_normal((PICTURES, OTHERS, NOISES))
    return own, np.ones((PICTURES, NOISES)), others


def test_wrong_captions_are_named_and_no_others():
    for seed in range(10):
        found = suspects(advantages(*errors(np.random.default_rng(seed), wrong=(3, 17))))
        assert np.flatnonzero(found).tolist() == [3, 17]


def test_a_caption_that_explains_a_little_of_its_picture_is_named_too():
    """As of a picture of noise, whose caption explains a seventh of what is usual."""
    own, empty, others = errors(np.random.default_rng(0), noise=0.03)
    own[5] += 0.085
    assert np.flatnonzero(suspects(advantages(own, empty, others))).tolist() == [5]


def test_with_none_wrong_none_is_named():
    claims = sum(suspects(advantages(*errors(np.random.default_rng(seed), noise=0.1))).any() for seed in range(30))
    assert claims <= 3


def test_captions_that_move_nothing_are_named():
    generator = np.random.default_rng(0)
    moved = generator.uniform(0.8, 1.2, (PICTURES, NOISES))
    moved[5] = 0.001
    assert np.flatnonzero(change_nothing(moved)).tolist() == [5]


def test_what_is_remembered_at_low_noise_is_told_from_what_is_understood():
    generator = np.random.default_rng(1)
    held_out = np.arange(PICTURES) >= 18
    base = np.ones((PICTURES, NOISES))
    fallen = 0.2 + 0.01 * generator.standard_normal((PICTURES, NOISES))
    low = fallen + np.where(np.arange(PICTURES) == 2, 0.4, 0.0)[:, None]
    fallen[7] = 0.01 * generator.standard_normal(NOISES)
    words = what_was_learnt(gains(base, base - fallen), gains(base, base - low), held_out)
    assert words[2] == "memorised" and words[7] == "not learnt"
    assert words.count("learnt") == PICTURES - 2
    assert gap(gains(base, base - low), held_out).value > 0
    assert gap(resample(np.ones((2, 1, 4))), np.array([False, False])) is None


def test_the_captions_to_compare_with_depend_on_each_text_alone():
    texts = list(range(40))
    chosen = other_captions("picture", 7, texts, 8)
    assert len(set(chosen)) == 8 and 7 not in chosen
    assert set(other_captions("picture", 7, texts[:-1], 8)) - set(chosen) <= set(texts)
    assert other_captions("other", 7, texts, 8) != chosen
