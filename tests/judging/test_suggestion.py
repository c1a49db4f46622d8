"""The earliest checkpoint that is about as near as any and loses little; and how sure that is."""

import numpy as np

from sd3pipe.judging.bootstrap import resample
from sd3pipe.judging.suggestion import Candidate, Loss, suggest

STEPS = (100, 200, 300, 400)


def candidates(multiplier: float = 1.0) -> list[Candidate]:
    return [Candidate(checkpoint=step, multiplier=multiplier) for step in STEPS]


def table(means, noise: float = 0.01, seed: int = 0):
    generator = np.random.default_rng(seed)
    return resample(np.array(means)[:, None, None] + noise * generator.standard_normal((len(means), 8, 4)))


def test_the_earliest_that_is_shown_to_be_as_near_is_suggested():
    found = suggest(candidates(), table([0.1, 0.3, 0.301, 0.302], noise=0.004), {})
    assert found.checkpoint == 200
    assert found.told_apart and found.sure > 0.5
    assert "at least 90% as near" in found.text and found.text.count(". ") == 1


def test_one_that_is_only_not_measurably_further_is_named_and_not_suggested():
    found = suggest(candidates(), table([0.1, 0.28, 0.29, 0.3], noise=0.1, seed=3), {})
    assert found.checkpoint == 400 and found.told_apart
    assert "Step 200 may be as near" in found.text and found.text.count(". ") == 1


def test_few_pictures_are_no_reason_to_stop_early():
    """Four in a row are chosen about equally often, whatever the noise; the first is not preferred."""
    chosen = [suggest(candidates(), table([0.3] * 4, noise=1.0, seed=seed), {}).checkpoint for seed in range(40)]
    assert chosen.count(100) < 20


def test_one_that_drifts_too_far_is_passed_over():
    drift = Loss(lost=table([0.1, 0.2, 0.6, 0.7]), limit=0.3)
    found = suggest(candidates(), table([0.1, 0.3, 0.5, 0.6]), {"drift": drift})
    assert found.checkpoint == 200


def test_where_nothing_tells_them_apart_that_is_said_with_how_many_pictures_it_would_take():
    found = suggest(candidates(), table([0.3, 0.301, 0.302, 0.303], noise=0.2), {})
    assert not found.told_apart
    assert found.draws_needed > 8 * 4
    assert "do not tell the checkpoints apart" in found.text


def test_a_loss_may_pass_its_limit_by_its_standard_error():
    likeness, lost = table([0.1, 0.3, 0.5, 0.6]), table([0.1, 0.1, 0.1, 0.5], noise=0.2, seed=1)
    error = lost.standard_errors()[3]
    for short, checkpoint in ((0.9, 400), (1.1, 300)):
        limit = float(lost.values_K[3] - short * error)
        assert suggest(candidates(), likeness, {"variety": Loss(lost=lost, limit=limit)}).checkpoint == checkpoint


def test_another_strength_only_where_none_passes_at_one():
    both = [*candidates(), *candidates(0.6)]
    likeness = table([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    passing = Loss(lost=table([0.1] * 8), limit=0.3)
    assert suggest(both, likeness, {"drift": passing}).multiplier == 1
    too_much = Loss(lost=table([0.9] * 4 + [0.1] * 4), limit=0.3)
    found = suggest(both, likeness, {"drift": too_much})
    assert found.multiplier == 0.6 and "none at strength 1" in found.text


def test_where_every_checkpoint_loses_too_much_nothing_is_suggested():
    found = suggest(candidates(), table([0.1, 0.2, 0.3, 0.4]), {"variety": Loss(lost=table([0.9] * 4), limit=0.3)})
    assert found.checkpoint is None and "least variety is lost by" in found.text


def test_what_is_no_nearer_than_the_base_is_called_weak():
    assert "evidence is weak" in suggest(candidates(), table([0.0, 0.0, 0.0, 0.0], noise=0.1), {}).text
