"""T-LoRA: the ranks that act are the paper's, per sample, in every way that the model runs; a file holds a LoRA."""

from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.random_adapters import random_adapter
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.adapters.algebra import resize
from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.kind import plain_adapter
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.network import attach, attach_deltas, merge_into
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.tlora import TLoRADelta, rank_mask
from sd3pipe.errors import InputError, ParameterError

PROJ = "joint_blocks.0.x_block.attn.proj"


@pytest.mark.parametrize(("rank", "min_rank"), [(64, 32), (32, 1), (16, 16), (5, 2), (1, 1), (3, 8)])
def test_mask_is_the_papers_at_every_timestep(rank, min_rank):
    """r(t) = floor((T - t) / T (r - r_min)) + r_min; layers with fewer ranks than r_min keep them all."""
    lowest = min(rank, min_rank)
    mask_BR = rank_mask(torch.arange(1001.0), rank, min_rank)
    for timestep, mask_R in enumerate(mask_BR):
        active = int(Fraction(1000 - timestep, 1000) * (rank - lowest)) + lowest
        assert mask_R.tolist() == [True] * active + [False] * (rank - active)
    assert mask_BR[0].all() and mask_BR[1000].sum() == lowest


def tlora(min_rank=1, **options):
    """A model with a T-LoRA of random factors on all its layers, and its deltas."""
    model = tiny_mmdit("sd35-medium")
    spec = AdapterSpec(algorithm="tlora", rank=6, tlora_min_rank=min_rank, embedder_ranks=(6,) * 6, **options)
    network = attach(model, spec)
    for layer in network.layers.values():
        torch.nn.init.normal_(layer.up, std=0.2, generator=torch.Generator().manual_seed(0))
    return model, network


def cut(adapter, rank):
    """The adapter's first ranks as a plain LoRA of the same strength."""
    return {
        path: LoRADelta(down=delta.down[:rank], up=delta.up[:, :rank], alpha=delta.scale * rank)
        for path, delta in adapter.items()
    }


@pytest.mark.parametrize("training", [True, False])
def test_each_sample_is_predicted_by_the_ranks_of_its_noise_level(training):
    model, network = tlora(min_rank=2)
    network.train(training)
    inputs = random_inputs() | {"timesteps_B": torch.tensor([200.0, 900.0])}  # 2 + floor(4 * 0.8), 2 + floor(4 * 0.1)
    together, deltas = model(**inputs), network.deltas()
    network.detach()
    base = model(**inputs)
    for number, rank in enumerate((5, 2)):
        few = attach_deltas(model, cut(deltas, rank))
        torch.testing.assert_close(model(**inputs)[number], together[number], rtol=1e-4, atol=1e-4)
        few.detach()
        assert not torch.allclose(base[number], together[number], rtol=1e-2, atol=1e-2)


def test_positional_arguments_tell_the_noise_level_too():
    model, network = tlora()
    inputs = random_inputs()
    expected = model(**inputs)
    network.set_timesteps(torch.zeros(2))
    assert torch.equal(model(*inputs.values()), expected)


def test_ranks_that_do_not_act_are_not_trained():
    model, network = tlora(min_rank=2)
    model(**random_inputs() | {"timesteps_B": torch.tensor([1000.0, 1000.0])}).square().sum().backward()
    layer = network.layers[PROJ]
    assert layer.down.grad[:2].abs().sum() > 0 and layer.down.grad[2:].abs().sum() == 0
    assert layer.up.grad[:, :2].abs().sum() > 0 and layer.up.grad[:, 2:].abs().sum() == 0


def test_a_network_without_masks_hooks_into_nothing():
    model = tiny_mmdit("sd35-medium")
    attach(model, AdapterSpec())
    assert not model._forward_pre_hooks
    model, network = tlora()
    with network.detached():
        assert not model._forward_pre_hooks
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.long
def test_a_checkpoint_keeps_the_mask_and_a_plain_file_says_what_is_lost(tmp_path, caplog):
    model, network = tlora(min_rank=3)
    deltas, inputs = network.deltas(), random_inputs()
    save_adapter(tmp_path / "kept.safetensors", deltas)
    kept = read_adapter(tmp_path / "kept.safetensors").adapter
    assert {type(delta) for delta in kept.values()} == {TLoRADelta} and compare(deltas, kept)[0] == 0.0
    expected = model(**inputs)
    network.detach()
    attach_deltas(model, kept)
    assert torch.equal(model(**inputs), expected)
    save_adapter(tmp_path / "plain.safetensors", plain_adapter(deltas), form="diffusers")
    assert caplog.text.count("whose ranks all act at every noise level") == 1
    plain = read_adapter(tmp_path / "plain.safetensors").adapter
    assert {type(delta) for delta in plain.values()} == {LoRADelta}
    assert compare(plain_adapter(deltas), plain)[0] < 1e-6


def test_whatever_changes_weights_takes_all_ranks(caplog):
    deltas = random_adapter(tiny_architecture("sd35-medium"), "tlora")
    merged, plain, inputs = tiny_mmdit("sd35-medium"), tiny_mmdit("sd35-medium"), random_inputs()
    merge_into(merged, deltas)
    assert "whose ranks all act at every noise level" in caplog.text
    merge_into(plain, plain_adapter(deltas))
    assert torch.equal(merged(**inputs), plain(**inputs))
    assert resize(deltas[PROJ], rank=2, energy=None).delta.rank == 2


@pytest.mark.parametrize("min_rank", [0, 17])
def test_a_lowest_rank_beyond_the_rank_is_refused(min_rank):
    with pytest.raises(ParameterError, match="tlora_min_rank is"):
        AdapterSpec(algorithm="tlora", rank=16, tlora_min_rank=min_rank)


def test_a_note_that_is_no_rank_is_refused(tmp_path):
    deltas = random_adapter(tiny_architecture("sd35-medium"), "tlora")
    save_adapter(tmp_path / "a.safetensors", deltas)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", {"sd3pipe_tlora_min_rank": "x"})
    with pytest.raises(InputError, match="should be a whole number"):
        read_adapter(tmp_path / "b.safetensors")
