"""What a run's own losses say of its pictures: standing at equal noise, and what was gained."""

import numpy as np
import pytest
from support.tiny_training import make_inputs, pictures

from sd3pipe.picture_losses import read_picture_losses
from sd3pipe.training.picture_losses import at_equal_noise, gained

VIEWS = 60


def drawn(picture_costs, seed=0, noise=0.05):
    """Returns sigmas and losses [picture, view]; a loss depends on the noise level far more than on the picture."""
    generator = np.random.default_rng(seed)
    sigmas = generator.uniform(0.02, 0.98, (len(picture_costs), VIEWS))
    costs = np.array(picture_costs)[:, None] * np.exp(noise * generator.standard_normal(sigmas.shape))
    return sigmas, costs * (0.1 + 3 * (sigmas - 0.6) ** 2)


def test_a_quantile_tells_pictures_apart_where_the_noise_level_decides_the_loss():
    sigmas, losses = drawn([0.8, 1.0, 1.0, 1.0, 1.2])
    quantiles, _ = at_equal_noise(sigmas.ravel(), losses.ravel())
    means = quantiles.reshape(sigmas.shape).mean(axis=1)
    assert means.argmin() == 0 and means[0] < 0.25
    assert means.argmax() == 4 and means[4] > 0.75
    assert np.abs(np.corrcoef(quantiles, sigmas.ravel())[0, 1]) < 0.1


def test_the_share_that_a_picture_gained_is_found_and_no_other():
    sigmas, losses = drawn([1.0] * 8)
    losses[3] *= np.linspace(1.0, 0.7, VIEWS)
    _, excess = at_equal_noise(sigmas.ravel(), losses.ravel())
    found = [gained(row, len(losses)) for row in excess.reshape(sigmas.shape)]
    assert [learnt for _, learnt in found] == [number == 3 for number in range(8)]
    score = found[3][0]
    assert score.low < 0.2 < score.high and score.value == pytest.approx(0.21, abs=0.05)


def test_nothing_is_claimed_where_nothing_was_learnt():
    claims = 0
    for seed in range(100):
        sigmas, losses = drawn([1.0] * 6, seed, noise=0.3)
        _, excess = at_equal_noise(sigmas.ravel(), losses.ravel())
        claims += any(gained(row, 6)[1] for row in excess.reshape(sigmas.shape))
    assert claims <= 10


@pytest.mark.long
def test_a_run_writes_each_sample_and_what_they_say(tmp_path):
    inputs = make_inputs(tmp_path, pictures(3), train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=6)
    run = inputs.train("r")
    for record in run.records():
        assert len(record["samples"]) == sum(record["subset_samples"].values())
        assert np.mean([loss for *_, loss in record["samples"]]) == pytest.approx(
            record["subset_loss"]["photos"], rel=1e-4
        )
    found = read_picture_losses(run.folder)
    assert len(found) == 3 and {picture.subset for picture in found} == {"photos"}
    assert sum(picture.seen for picture in found) == sum(len(record["samples"]) for record in run.records())
    assert all(0 < picture.quantile < 1 and picture.gained is not None for picture in found)
