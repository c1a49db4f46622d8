"""Which samples a step sees: pure functions of content, seed and epoch."""

from dataclasses import replace

import numpy as np
import pytest

from sd3pipe.cache.join import RowLists
from sd3pipe.diffusion.draws import hashes, normals, uniforms
from sd3pipe.training.batches import (
    Items,
    Position,
    SubsetRules,
    epoch_batches,
    fixed_batches,
    plan_steps,
    steps_of_epochs,
)


def make_items(count: int = 11, *, repeats=None, captions=1, crops=1, rules=None, lengths=None) -> Items:
    """Pictures of two latent sizes; caption variant v of picture p is text row p * captions + v, the last is empty."""
    texts = count * captions + 1
    return Items(
        names=[f"{number}.png" for number in range(count)],
        ids=hashes(np.arange(count, dtype=np.uint64), "picture"),
        subsets=np.zeros(count, dtype=np.int64),
        repeats=np.array(repeats if repeats is not None else [1] * count),
        rules=(rules or SubsetRules(name="all"),),
        latents=RowLists.of([[p * crops + c for c in range(crops)] for p in range(count)]),
        captions=RowLists.of([[p * captions + v for v in range(captions)] for p in range(count)]),
        empty_caption=texts - 1,
        latent_shapes=np.array([[8, 8 + 4 * (p % 2)] for p in range(count) for _ in range(crops)]),
        text_lengths=np.array(lengths if lengths is not None else [7] * texts),
    )


def pictures_of(batches) -> list[int]:
    return [int(picture) for batch in batches for picture in batch.pictures]


def batches_of(items: Items, epoch: int = 0, batch_size: int = 2, seed: int = 42):
    return epoch_batches(items, seed=seed, epoch=epoch, batch_size=batch_size)


def test_an_epoch_shows_every_picture_as_often_as_it_repeats():
    items = make_items(repeats=[number % 4 for number in range(11)])
    shown = pictures_of(batches_of(items))
    assert [shown.count(number) for number in range(11)] == [number % 4 for number in range(11)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_have_one_shape_and_the_last_is_kept(batch_size):
    items = make_items(captions=2, lengths=[5 + row % 3 for row in range(23)])
    batches = batches_of(items, batch_size=batch_size)
    for batch in batches:
        assert len({tuple(items.latent_shapes[row]) for row in batch.latent_rows}) == 1
        assert len({int(items.text_lengths[row]) for row in batch.text_rows}) == 1
        assert 1 <= len(batch) <= batch_size
    assert sorted(pictures_of(batches)) == list(range(11))


def test_order_and_composition_differ_by_epoch_and_seed_alone():
    items = make_items()
    assert pictures_of(batches_of(items)) == pictures_of(batches_of(items))
    assert pictures_of(batches_of(items)) != pictures_of(batches_of(items, epoch=1))
    assert pictures_of(batches_of(items)) != pictures_of(batches_of(items, seed=1))


def test_the_numbers_of_a_picture_do_not_depend_on_the_others():
    """Ids, crops and captions stay when pictures join; only the company in a batch changes."""
    few, many = make_items(6, captions=3, crops=2), make_items(11, captions=3, crops=2)

    def choices(items: Items) -> dict[int, tuple[int, int, int]]:
        return {
            int(p): (int(i), int(latent), int(text))
            for batch in batches_of(items, epoch=3)
            for p, i, latent, text in zip(batch.pictures, batch.ids, batch.latent_rows, batch.text_rows, strict=True)
        }

    chosen, among_many = choices(few), choices(many)
    assert chosen == {picture: among_many[picture] for picture in chosen}


def test_repeats_of_a_picture_have_their_own_numbers():
    items = make_items(2, repeats=[5, 0])
    ids = [int(number) for batch in batches_of(items) for number in batch.ids]
    assert len(set(ids)) == 5


def test_caption_variants_take_turns():
    items = make_items(4, captions=3)
    seen = {picture: [] for picture in range(4)}
    for epoch in range(3):
        for batch in batches_of(items, epoch=epoch):
            for picture, text in zip(batch.pictures, batch.text_rows, strict=True):
                seen[int(picture)].append(int(text))
    for picture, texts in seen.items():
        assert sorted(texts) == [3 * picture, 3 * picture + 1, 3 * picture + 2]


def test_crops_and_flips_are_drawn_evenly():
    items = make_items(40, crops=2)
    rows = [int(row) % 2 for epoch in range(20) for batch in batches_of(items, epoch) for row in batch.latent_rows]
    assert abs(np.mean(rows) - 0.5) < 0.07  # four standard deviations of 800 coin tosses


def test_captions_are_dropped_at_their_rate_and_in_every_nth_epoch():
    items = make_items(100, rules=SubsetRules(name="all", caption_dropout_rate=0.2))
    dropped = [row == items.empty_caption for e in range(10) for b in batches_of(items, e) for row in b.text_rows]
    assert abs(np.mean(dropped) - 0.2) < 0.05  # four standard deviations of 1000 draws
    every = replace(items, rules=(SubsetRules(name="all", caption_dropout_every_n_epochs=3),))
    shares = [np.mean([row == 100 for b in batches_of(every, e) for row in b.text_rows]) for e in range(6)]
    assert shares == [0, 0, 1, 0, 0, 1]


def take(items: Items, steps: int, start: Position | None = None, **options):
    plans = plan_steps(items, start or Position(), seed=42, batch_size=2, **options)
    return [next(plans) for _ in range(steps)]


def test_steps_follow_one_another_over_the_ends_of_epochs():
    items = make_items()
    per_epoch = len(batches_of(items))
    plans = take(items, 10, accumulation=4)
    batches = [batch for plan in plans for batch in plan.micro_batches]
    assert [(b.epoch, b.index) for b in batches] == [divmod(n, per_epoch) for n in range(40)]
    assert plans[-1].epochs_done == 40 // per_epoch
    assert steps_of_epochs(items, 3, seed=42, batch_size=2, micro_batches=4) == -(-3 * per_epoch // 4)


@pytest.mark.parametrize("after", [1, 3, 7])
def test_a_plan_goes_on_from_any_step(after):
    items = make_items()
    whole = take(items, 12, accumulation=3)
    rest = take(items, 12 - after, start=whole[after - 1].end, accumulation=3)
    names = [[(b.epoch, b.index) for plan in plans for b in plan.micro_batches] for plans in (whole[after:], rest)]
    assert names[0] == names[1]


def test_ranks_share_what_one_process_would_see():
    items = make_items()
    alone = take(items, 5, accumulation=6)
    ranks = [take(items, 5, accumulation=2, rank=rank, num_ranks=3) for rank in range(3)]
    for step in range(5):
        shared = sorted((b.epoch, b.index) for plans in ranks for b in plans[step].micro_batches)
        assert shared == sorted((b.epoch, b.index) for b in alone[step].micro_batches)
        assert {plans[step].end for plans in ranks} == {alone[step].end}


def test_fixed_batches_show_each_picture_once_with_its_first_rows():
    items = make_items(captions=2, crops=2)
    batches = fixed_batches(items, batch_size=3)
    assert sorted(pictures_of(batches)) == list(range(11))
    assert all((batch.text_rows == 2 * batch.pictures).all() for batch in batches)


def test_draws_are_uniform_and_normal_and_belong_to_their_key():
    ids = np.arange(20_000, dtype=np.uint64)
    draws = uniforms(ids, 42, "sigma", 0)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    other = uniforms(ids, 42, "sigma", 1)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.03
    assert np.array_equal(uniforms(ids[5:7], 42, "sigma", 0), draws[5:7])
    noise = normals((100, 100), 42, "noise", 0, 7)
    assert np.array_equal(noise, normals((100, 100), 42, "noise", 0, 7))
    assert abs(noise.mean()) < 0.04
    assert abs(noise.std() - 1) < 0.03
    assert not np.array_equal(noise, normals((100, 100), 42, "noise", 0, 8))
