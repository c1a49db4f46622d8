"""What each score calls by its name, on embeddings that are made to be so."""

import numpy as np
import pytest

from sd3pipe.judging.scores import Embedded, as_scores, losses, measure, nearness, variety
from sd3pipe.judging.suggestion import Candidate

PROMPTS, SEEDS, WIDTH = 6, 4, 24
TRIGGER = np.array([True, True, True, False, False, False])
CANDIDATES = [Candidate(checkpoint=1, multiplier=1.0)]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def around(centres, spread, generator):
    return unit(centres + spread * unit(generator.standard_normal(centres.shape)))


@pytest.fixture
def scene():
    """Training pictures around one place, prompts with places of their own, the base's pictures around these."""
    generator = np.random.default_rng(0)
    concept = unit(generator.standard_normal(WIDTH))
    trained = around(np.tile(concept, (8, 1)), 0.7, generator)
    texts = unit(generator.standard_normal((PROMPTS, WIDTH)))
    places = np.repeat(texts[:, None], SEEDS, axis=1)
    base = around(places, 0.4, generator)
    return generator, concept, trained, texts, base


def judged(scene, drawn, tolerance=0.5):
    _, _, trained, texts, base = scene
    embedded = Embedded(
        drawn_CPSD=np.stack([base, drawn]), trained_ND=trained, held_out_MD=np.zeros((0, WIDTH)),
        texts_PD=texts, with_trigger_P=TRIGGER,
    )  # fmt: skip
    measured = measure(embedded)
    return as_scores(CANDIDATES, measured, tolerance)[0], losses(measured, tolerance)


def test_the_base_itself_scores_nothing(scene):
    scores, lost = judged(scene, scene[-1])
    for name in ("likeness", "copying", "prompt", "drift", "variety"):
        assert getattr(scores, name).value == pytest.approx(0, abs=1e-9)
    assert not scores.close and not scores.drifts
    assert set(lost) == {"prompt", "drift", "variety"}


def test_the_concept_where_it_is_asked_for_is_likeness_and_no_drift(scene):
    generator, concept, _, texts, base = scene
    drawn = base.copy()
    drawn[TRIGGER] = around(unit(texts[TRIGGER][:, None] + 1.5 * concept) + np.zeros((3, SEEDS, WIDTH)), 0.5, generator)
    scores, _ = judged(scene, drawn)
    assert scores.likeness.low > 0
    assert not scores.drifts and not scores.close


def test_the_concept_for_every_prompt_is_called_drift(scene):
    generator, concept, *_ = scene
    scores, lost = judged(scene, around(np.tile(concept, (PROMPTS, SEEDS, 1)), 0.7, generator))
    assert scores.drifts
    assert lost["drift"].lost.values_K[0] > lost["drift"].limit


def test_one_training_picture_over_and_over_is_called_copying(scene):
    generator, _, trained, _, base = scene
    drawn = base.copy()
    drawn[TRIGGER] = around(np.tile(trained[2], (3, SEEDS, 1)), 0.1, generator)
    scores, lost = judged(scene, drawn)
    assert scores.close
    assert lost["variety"].lost.values_K[0] > 0


def test_pictures_as_far_apart_as_the_training_pictures_are_no_copies(scene):
    generator, concept, trained, _, _ = scene
    drawn = around(np.tile(concept, (1, 50, 40, 1)), 0.7, generator)
    assert abs(nearness(drawn, trained).mean()) < 0.15
    assert nearness(np.tile(trained[:1], (1, 1, 1, 1)), trained).min() > 0.1


def test_drawing_an_unknown_word_as_anything_is_no_variety_to_be_lost(scene):
    """The base scatters where the trigger stands; the checkpoint varies there as the base does elsewhere."""
    generator, concept, trained, texts, base = scene
    scattered, drawn = base.copy(), base.copy()
    scattered[TRIGGER] = unit(generator.standard_normal((3, SEEDS, WIDTH)))
    drawn[TRIGGER] = around(np.tile(concept, (3, SEEDS, 1)), 0.4, generator)
    scores, lost = judged((generator, concept, trained, texts, scattered), drawn)
    assert scores.variety.value < -0.5 * variety(scattered[None, TRIGGER]).mean()
    assert lost["variety"].lost.values_K[0] <= lost["variety"].limit
    drawn[TRIGGER] = np.tile(trained[2], (3, SEEDS, 1))
    _, lost = judged((generator, concept, trained, texts, scattered), drawn)
    assert lost["variety"].lost.values_K[0] > lost["variety"].limit


def test_variety_is_the_mean_distance_of_pairs(scene):
    base = scene[-1]
    pairs = [1 - base[:, i] @ base[:, j].T for i in range(SEEDS) for j in range(SEEDS) if i != j]
    assert variety(base[None]).mean() == pytest.approx(np.mean([np.diag(pair) for pair in pairs]))
