"""Batches from cache rows: fresh latents and noise by counter, fp32 noise levels, encoders dropped at their rates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_training import (
    CLIP_TOKENS,
    CLIP_WIDTHS,
    POOLED_WIDTHS,
    Inputs,
    Picture,
    make_feed,
    make_inputs,
    pictures,
    plans,
)

from sd3pipe.cache.tensors import row_from_torch, row_to_torch
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.vae import from_model_space
from sd3pipe.rules.feeding import EncoderDropout
from sd3pipe.training.feed import Batch
from sd3pipe.training.training_data import open_data

STANDARD_DEVIATION = float(np.exp(-2))  # tiny_training's rows have log-variance -4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    subsets = {"photos": {"diff_output_preservation": True}, "class": {"is_reg": True, "prior_loss_weight": 0.25}}
    dataset = [*pictures(3, size=(8, 8)), *pictures(6, size=(8, 8), subset="class")[3:]]
    return make_inputs(tmp_path_factory.mktemp("feed"), dataset, subsets=subsets)


def by_sample(batch: Batch) -> dict[int, dict[str, torch.Tensor]]:
    names = ("latents", "noise", "sigmas", "context", "pooled", "weights", "dropout_keys")
    return {int(number): {n: getattr(batch, n)[i] for n in names} for i, number in enumerate(batch.plan.ids)}


def test_what_leaves_nothing_to_train_on_is_told(tmp_path, caplog):
    photo, lone = Picture(name="a.png", captions=("a",)), Picture(name="b.png", subset="lone", captions=("b",))
    held_out = replace(photo, split="validation")
    with pytest.raises(InputError, match="leave no picture to train on: validation_split holds all of them out"):
        make_feed(make_inputs(tmp_path / "held out", [held_out]))
    with pytest.raises(ParameterError, match=r"no picture is seen: .* regularisation pictures without others"):
        make_feed(make_inputs(tmp_path / "reg", [lone], subsets={"lone": {"is_reg": True}}))
    make_feed(make_inputs(tmp_path / "apart", [photo, lone], subsets={"lone": {"is_reg": True, "dataset": 1}}))
    assert "no picture of lone is seen" in caplog.text


def test_captions_whose_lengths_break_batches_up_are_told_once_with_the_ways_out(tmp_path, caplog):
    dataset = [
        Picture(name=f"{number}.png", captions=(f"picture {number}",), tokens=6 + number % 4) for number in range(8)
    ]
    inputs = make_inputs(tmp_path, dataset)
    open_data(inputs.params("none"))  # a batch is one picture
    alike = make_inputs(tmp_path / "alike", [replace(picture, tokens=6) for picture in dataset])
    open_data(alike.params("none", train_batch_size=4))
    assert "share a batch" not in caplog.text
    open_data(inputs.params("none", train_batch_size=4, gradient_accumulation_steps=2))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "an epoch has 4 batches of 2.00 pictures on average, where train_batch_size = 4 could make 2" in told
    assert "train_batch_size = 1 with gradient_accumulation_steps = 8" in told and "t5_pad_to" in told


def test_latents_are_drawn_anew_from_mean_and_variance(inputs):
    feed = make_feed(inputs)
    draws = [by_sample(feed.batch(plan)) for plan in plans(feed, range(40))]
    for number in draws[0]:
        drawn = from_model_space(torch.stack([batch[number]["latents"] for batch in draws]))
        # 40 draws of 1024 elements each: the mean of their variances is known to 1 %
        assert float(drawn.var(dim=0).mean().sqrt()) == pytest.approx(STANDARD_DEVIATION, rel=0.02)
        assert not torch.equal(drawn[0], drawn[1])
        assert abs(float(drawn.mean()) - float(drawn[0].mean())) < 0.02


def test_a_sample_s_numbers_belong_to_it_and_the_epoch_alone(inputs):
    """Not to its company in the batch, which a worker, a process or a batch size may change."""
    rates = EncoderDropout(clip_l_dropout_rate=0.3, clip_g_dropout_rate=0.3, t5_dropout_rate=0.3)
    feed = make_feed(inputs, encoder_dropout=rates)
    together = {k: v for plan in plans(feed, range(1), 6) for k, v in by_sample(feed.batch(plan)).items()}
    alone = {k: v for plan in plans(feed, range(1), 1) for k, v in by_sample(feed.batch(plan)).items()}
    assert len(together) == len(alone) == 6
    for number, values in together.items():
        assert all(torch.equal(values[name], alone[number][name]) for name in values)
    later = {k: v for plan in plans(feed, range(1, 2)) for k, v in by_sample(feed.batch(plan)).items()}
    assert all(not torch.equal(later[n]["noise"], together[n]["noise"]) for n in together)


def test_noise_levels_are_float32_and_finer_than_bfloat16(inputs):
    feed = make_feed(inputs)
    sigmas = torch.cat([feed.batch(plan).sigmas for plan in plans(feed, range(30))])
    assert sigmas.dtype == torch.float32
    assert len(set(sigmas.tolist())) == len(sigmas)
    assert (sigmas != sigmas.bfloat16().float()).float().mean() > 0.9


@pytest.mark.long
def test_encoders_are_dropped_at_their_own_rates_independently(inputs):
    rates = EncoderDropout(clip_l_dropout_rate=0.2, clip_g_dropout_rate=0.5, t5_dropout_rate=0.8)
    feed = make_feed(inputs, encoder_dropout=rates)
    batches = [feed.batch(plan) for plan in plans(feed, range(150))]
    context, pooled = torch.cat([b.context for b in batches]), torch.cat([b.pooled for b in batches])
    (clip_l, clip_g), l_pooled = CLIP_WIDTHS, POOLED_WIDTHS[0]
    dropped = torch.stack(
        [
            (context[:, :CLIP_TOKENS, :clip_l] == 0).all(dim=(1, 2)),
            (context[:, :CLIP_TOKENS, clip_l : clip_l + clip_g] == 0).all(dim=(1, 2)),
            (context[:, CLIP_TOKENS:] == 0).all(dim=(1, 2)),
        ]
    ).float()
    assert dropped.mean(dim=1).tolist() == pytest.approx(
        (0.2, 0.5, 0.8), abs=0.06
    )  # four standard deviations of 900 draws
    assert torch.corrcoef(dropped).fill_diagonal_(0).abs().max() < 0.14
    assert torch.equal((pooled[:, :l_pooled] == 0).all(dim=1), dropped[0].bool())
    assert torch.equal((pooled[:, l_pooled:] == 0).all(dim=1), dropped[1].bool())


def test_weights_and_preserved_samples_follow_the_subset(inputs):
    feed = make_feed(inputs)
    (plan,) = plans(feed, range(1))
    batch = feed.batch(plan)
    is_reg = torch.tensor([feed.items.rules[int(s)].name == "class" for s in batch.subsets])
    assert is_reg.sum() == 3
    assert torch.equal(batch.weights, torch.where(is_reg, 0.25, 1.0))
    assert batch.preserve is not None
    assert torch.equal(batch.preserve, ~is_reg)


def test_packed_text_is_read_as_what_it_was(inputs, monkeypatch):
    feed = make_feed(inputs)
    (plan, *_) = plans(feed, range(1))
    dense = feed.batch(plan).context
    read = feed.text.row
    monkeypatch.setattr(feed.text, "row", lambda row: row_from_torch(row_to_torch(read(row)), packed=["t5xxl"]))
    packed = feed.batch(plan).context
    assert torch.equal(packed[:, :CLIP_TOKENS], dense[:, :CLIP_TOKENS])
    assert 0 < (packed - dense).norm() / dense.norm() < 0.01
