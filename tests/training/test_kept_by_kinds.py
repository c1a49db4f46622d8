"""What each kind of adapter keeps for the backward pass is in the plan, whatever its layers compute."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from support.new_memory import NewMemory
from support.public_models import PUBLIC_ARCHITECTURES
from support.tiny_mmdit import tiny_architecture, tiny_mmdit

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import BLOCK_PARTS, AdapterSpec
from sd3pipe.adapters.weights import activation_rank, adapter_weights, trained_shapes
from sd3pipe.memory.plan import Settings, Workload, predict
from sd3pipe.memory.sizes import Tokens, kept_bytes, model_size
from sd3pipe.params.train import TrainParams
from sd3pipe.training.kept_by_kinds import kept_beside_lora
from sd3pipe.training.memory_plan import run_memory
from sd3pipe.words import Algorithm

WORK, RANK = Workload(image_tokens=128, text_tokens=32), 8


@pytest.mark.long
@pytest.mark.parametrize("kind", get_args(Algorithm))
@pytest.mark.parametrize("variant", ["sd35-medium", "sd35-large"])
def test_a_block_keeps_as_many_bytes_as_the_plan_says(variant, kind):
    model, spec = tiny_mmdit(variant), AdapterSpec(algorithm=kind, rank=RANK)
    network, block, width = attach(model, spec), model.joint_blocks[0], model.architecture.width
    network.set_timesteps(torch.tensor([500.0]))
    streams = [torch.randn(1, length, width) for length in (WORK.text_tokens, WORK.image_tokens)]
    with torch.no_grad():
        streams += block.modulation(torch.randn(1, width))
    inputs = [tensor.requires_grad_() for tensor in streams]
    size = model_size(model.architecture.shapes())
    work = replace(WORK, adapter_rank=activation_rank(spec))
    tokens = Tokens(width=width, image=128, text=32, dtype_bytes=4, rank=work.adapter_rank, qk_norm=size.qk_norm)
    with NewMemory([*block.parameters(), *network.parameters(), *inputs]) as memory:
        outputs = block(*inputs)
    found = memory.bytes() - sum(tensor.nbytes for tensor in outputs) + tokens.input_bytes
    more = kept_beside_lora(model.architecture, spec, work, torch.float32)
    assert kept_bytes(size.blocks[0], tokens, "all") + more == pytest.approx(found, rel=0.02)


def test_an_adapter_outside_of_the_blocks_keeps_nothing_in_them():
    spec = AdapterSpec(algorithm="dora", rank=RANK, part_ranks=dict.fromkeys(BLOCK_PARTS, 0), embedder_ranks=(4,) * 6)
    assert kept_beside_lora(tiny_architecture("sd35-large"), spec, WORK, torch.float32) == 0


def test_the_plan_counts_it_for_each_block_that_is_there_whole():
    model, more = model_size(tiny_architecture("sd35-large", depth=4).shapes()), 10**9
    for kept, times in ((0, 1), (3, 3), (4, 4)):  # of three, before which the first is computed again
        settings = Settings(all_kept_blocks=kept)
        with_it = predict(model, replace(WORK, adapter_kept_bytes=more), settings)
        assert with_it.tensor_bytes - predict(model, WORK, settings).tensor_bytes == times * more


def test_train_plans_for_the_kind_that_it_trains():
    plans = {
        kind: run_memory(
            TrainParams(model="base", text="text", latents="latents", out="run", adapter_type=kind, network_dim=RANK),
            tiny_architecture("sd35-large"),
            resolutions_px=[(64, 64)],
            text_tokens=32,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for kind in ("lora", "dora")
    }
    assert plans["lora"].work.adapter_kept_bytes == 0
    assert plans["dora"].work.adapter_kept_bytes > 0
    assert plans["dora"].work.adapter_weights > plans["lora"].work.adapter_weights  # by its magnitudes


SPECS = {
    "whole": {},
    "parts": {"part_ranks": {"x_attn": 4, "context_mod": 0}, "blocks": "0,2", "embedder_ranks": (4, 0, 4, 0, 4, 4)},
    "rules": {"rank_rules": ((r"attn2?\.qkv", 2), (r"mlp", 0))},
}


@pytest.mark.parametrize("kind", get_args(Algorithm))
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_weights_are_counted_as_they_are_trained(variant, name, kind):
    spec = AdapterSpec(algorithm=kind, rank=RANK, **SPECS[name])
    model = tiny_mmdit(variant)
    network = attach(model, spec)
    assert trained_shapes(model.architecture.linear_sizes(), spec) == [p.shape for p in network.parameters()]
    sizes = {path: (linear.out_features, linear.in_features) for path, linear in model.linears()}
    assert model.architecture.linear_sizes() == sizes


def test_whole_lokr_factors_are_counted_as_they_are():
    """LyCORIS' users ask for them by a rank that no layer has."""
    architecture = PUBLIC_ARCHITECTURES["sd35-medium"]
    spec = AdapterSpec(algorithm="lokr", rank=100_000, lokr_factor=8)
    sizes = architecture.linear_sizes()
    in_blocks = [size for path, size in sizes.items() if path.startswith("joint_blocks")]
    weights = sum(8 * 8 + (rows // 8) * (columns // 8) for rows, columns in in_blocks)
    assert adapter_weights(sizes, spec) == weights < 35e6
    assert activation_rank(spec) == 0


def test_train_plans_whole_lokr_factors_like_those_of_a_smaller_rank():
    plans = [
        run_memory(
            TrainParams(
                model="base", text="text", latents="latents", out="run", adapter_type="lokr", network_dim=rank,
                network_args=("lokr_factor=4",),
            ),
            tiny_architecture("sd35-large"),
            resolutions_px=[(64, 64)],
            text_tokens=32,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for rank in (512, 100_000)
    ]  # fmt: skip
    assert plans[0].work == plans[1].work


def test_weights_of_split_projections_are_counted():
    model, spec = tiny_mmdit("sd35-large"), AdapterSpec(rank=RANK, split_qkv=True)
    network = attach(model, spec)
    assert trained_shapes(model.architecture.linear_sizes(), spec) == [p.shape for p in network.parameters()]
