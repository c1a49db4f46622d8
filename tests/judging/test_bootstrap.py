"""Intervals have the width that theory gives, and nothing is told apart that is alike."""

from itertools import combinations

import numpy as np
import pytest

from sd3pipe.intervals import t_quantile
from sd3pipe.judging import bootstrap
from sd3pipe.judging.bootstrap import differences, draws_to_tell, resample

POSERS = 9
TRIALS = 200
PAIRS = differences(POSERS, list(combinations(range(POSERS), 2)))


def test_an_interval_over_many_prompts_is_that_of_the_mean():
    table = np.random.default_rng(1).standard_normal((1, 400, 1))
    score = resample(table).score(0)
    half = 1.96 * table.std(ddof=1) / 20
    assert score.value == pytest.approx(table.mean())
    assert (score.high - score.low) / 2 == pytest.approx(half, rel=0.05)


def test_the_noise_of_single_pictures_counts_once():
    """Prompts' means and seeds' means both hold it; taken as it comes, the interval would be 1.4 times too wide."""
    generator = np.random.default_rng(2)
    table = generator.standard_normal((200, 20, 20))
    errors = resample(table).standard_errors()
    assert np.mean(errors) == pytest.approx(1 / 20, rel=0.15)


def test_what_a_seed_does_to_all_prompts_widens_the_interval():
    generator = np.random.default_rng(3)
    table = generator.standard_normal((1, 1, 16)) + np.zeros((1, 50, 16))
    assert resample(table).standard_errors()[0] == pytest.approx(table.std(ddof=1) / 4, rel=0.1)


def test_what_prompts_and_seeds_do_to_all_alike_cancels_in_a_difference():
    generator = np.random.default_rng(4)
    shared = 100 * generator.standard_normal((1, 8, 4))
    resampled = resample(np.concatenate([shared, shared + 1]))
    score = resampled.combined(differences(2, [(1, 0)])).score(0)
    assert score.low == pytest.approx(1) and score.high == pytest.approx(1)


def test_a_single_picture_has_no_interval():
    score = resample(np.ones((1, 1, 1))).score(0)
    assert score.low is None and score.high is None


@pytest.mark.parametrize("shape", [(8, 4), (4, 4), (8, 2)])
@pytest.mark.parametrize("kind", ["pictures", "prompts"])
def test_one_adapter_that_poses_as_nine_is_told_apart_in_at_most_20_of_200_trials(shape, kind, monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    claims = 0
    for trial in range(TRIALS):
        generator = np.random.default_rng(trial)
        table = generator.standard_normal((POSERS, *shape))
        if kind == "prompts":  # each poser is better at some prompts and worse at others
            table += 2 * generator.standard_normal((POSERS, shape[0], 1))
        family = resample(table).combined(PAIRS).family()
        claims += any(not score.low <= 0 <= score.high for score in family)
    assert claims <= 20


def test_a_true_difference_is_found():
    generator = np.random.default_rng(5)
    table = generator.standard_normal((2, 8, 4)) + np.array([0.0, 3.0])[:, None, None]
    (score,) = resample(table).combined(differences(2, [(1, 0)])).family()
    assert score.low > 0


def test_draws_to_tell_grow_with_the_square_of_noise_over_difference():
    generator = np.random.default_rng(6)
    noise = generator.standard_normal((1, 10, 10))
    noise -= noise.mean()
    near, far = (draws_to_tell(resample(noise + value), 0) for value in (0.05, 0.1))
    assert near == pytest.approx(4 * far, rel=0.01)
    assert draws_to_tell(resample(noise), 0) is None


def test_t_has_heavier_tails_than_the_normal():
    assert t_quantile(1.5) == 12.71
    assert t_quantile(29) == 2.045
    assert t_quantile(1000) == 1.96
