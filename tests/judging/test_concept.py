"""Along what sets the training pictures apart: the base is 0, they are 1, and what both vary in counts little."""

import numpy as np
import pytest

from sd3pipe.judging.concept import discriminant, shrunken_covariance, towards

PROMPTS, SEEDS, WIDTH, PICTURES = 8, 4, 24, 12
CONCEPT = np.eye(WIDTH)[0]
LOUD = np.where(
    np.arange(WIDTH) < 12, 1.0, 0.1
)  # pictures differ among themselves, as in colours, by far the most here
LOUD[0] = 0.2


def varied(generator, *shape):
    return LOUD * generator.standard_normal((*shape, WIDTH))


def scene(seed: int, *shares: float):
    """Returns base and columns that have come by some shares towards pictures of the concept, and these pictures."""
    generator = np.random.default_rng(seed)
    base = varied(generator, PROMPTS, 1) + 0.2 * varied(generator, PROMPTS, SEEDS)
    columns = [base + share * CONCEPT + 0.3 * varied(generator, PROMPTS, SEEDS) for share in shares]
    return np.stack([base, *columns]), CONCEPT + varied(generator, PICTURES)


def test_the_base_is_nought_and_the_training_pictures_are_one():
    found = [towards(*scene(seed, 0.0, 1.0)).mean(axis=(1, 2)) for seed in range(40)]
    nought, one = np.mean(found, axis=0)
    assert abs(nought) < 0.05
    assert one == pytest.approx(1, abs=0.15)


def test_what_pictures_vary_in_among_themselves_hides_less_than_in_a_cosine():
    """How many standard errors lie between two columns, half of the way apart from each other by a tenth."""
    tells = {"towards": [], "cosine": []}
    for seed in range(40):
        drawn, pictures = scene(seed, 0.45, 0.55)
        cosines = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)) @ pictures.mean(axis=0)
        for name, scores in (("towards", towards(drawn, pictures)), ("cosine", cosines[1:])):
            differences = scores[1] - scores[0]
            tells[name].append(differences.mean() / differences.std() * np.sqrt(differences.size))
    assert np.mean(tells["towards"]) > 1.5 * np.mean(tells["cosine"])


def test_drawing_each_prompt_anew_comes_hardly_nearer():
    """A direction that is fitted to the very pictures which are subtracted would call that a third of the way."""
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        places = 0.3 * varied(generator, PROMPTS, 1)
        base, again = (places + varied(generator, PROMPTS, SEEDS) for _ in range(2))
        found.append(towards(np.stack([base, again]), 0.5 * CONCEPT + varied(generator, PICTURES)))
    assert abs(np.mean([item.mean() for item in found if item is not None])) < 0.2


def test_pictures_that_the_base_draws_anyway_are_not_told_apart():
    drawn, _ = scene(0, 0.5)
    assert towards(drawn, drawn[0].reshape(-1, WIDTH)) is None


@pytest.mark.parametrize("prompts, seeds, pictures", [(1, 1, 1), (1, 4, 12), (8, 1, 12), (8, 4, 1), (2, 2, 5)])
def test_few_pictures_have_their_place_too(prompts, seeds, pictures):
    drawn, trained = (0.1 * vectors for vectors in scene(0, 1.0))
    found = towards(drawn[:, :prompts, :seeds], 2 * CONCEPT + trained[:pictures])
    assert found.shape == (1, prompts, seeds) and np.isfinite(found).all()


def test_sets_that_coincide_have_no_direction():
    same = np.ones((3, WIDTH))
    assert not discriminant(same, same).any()


def test_a_covariance_of_few_is_near_a_multiple_of_the_identity_and_of_many_is_their_own():
    generator = np.random.default_rng(0)
    few, many = varied(generator, 3), varied(generator, 20_000)
    plain = np.diag(LOUD**2)
    assert shrunken_covariance(many) == pytest.approx(plain, abs=0.05)
    least, most = np.linalg.eigvalsh(shrunken_covariance(few))[[0, -1]]
    assert least > 0.05 * most
