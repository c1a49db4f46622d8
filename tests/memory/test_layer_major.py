"""Layer-major accumulation gives the ordinary order's losses and gradients, for fewer copies."""

import inspect

import pytest
import torch
from support.streaming_cases import PoisoningCopyStream, add_adapters, parameters
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.memory.activations import ActivationStore
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.memory.streaming import BlockStreamer

A = 3
BATCHES = [random_inputs(seed=seed, batch=1 + seed % 2, height=4, width=6) for seed in range(A)]


def _loss(number, velocity):
    return velocity.float().square().mean() / A


def _ordinary(variant, adapters, *, autocast=False, batches=BATCHES):
    model = tiny_mmdit(variant)
    model.keep_activations(["none"] * model.architecture.depth)
    layers = add_adapters(model, adapters)
    losses = []
    for number, inputs in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = _loss(number, model(**inputs))
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in parameters(layers)}


def _layer_major(variant, adapters, *, autocast=False, batches=BATCHES, select=lambda number: None, **streaming):
    model = tiny_mmdit(variant)
    model.keep_activations(("none",) * len(model.joint_blocks))
    layers = add_adapters(model, adapters)
    with BlockStreamer(model, device="cpu", stream=PoisoningCopyStream(), **streaming) as streamer:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = run_layer_major(model, streamer, batches, _loss, select)
        return losses, {name: p.grad for name, p in parameters(layers)}, streamer.copied_bytes


def _same_gradients(expected, found):
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        equal = found[name] is None if gradient is None else torch.equal(gradient, found[name])
        assert equal, name


ADAPTERS = {
    "attention": ["attn.qkv"],
    "modulation": ["adaLN_modulation.1", "mlp.fc2"],
    "from the second block on": ["1.x_block.attn.proj", "2.x_block.mlp.fc1"],
    "embedders": ["t_embedder.mlp.2", "y_embedder.mlp.0", "context_embedder", "x_embedder.proj", "final_layer.linear"],
}


@pytest.mark.parametrize("count, modulation", [(0, "stream"), (2, "stream"), (3, "stream"), (3, "resident")])
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_losses_and_gradients_are_those_of_the_ordinary_order(adapters, count, modulation):
    losses, gradients = _ordinary("sd35-medium", adapters)
    found_losses, found, _ = _layer_major("sd35-medium", adapters, blocks_to_swap=count, modulation=modulation)
    assert all(torch.equal(a, b) for a, b in zip(losses, found_losses, strict=True))
    _same_gradients(gradients, found)


@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-large"])
def test_other_variants_autocast_skips_and_offload_change_no_bit_either(variant):
    batches = [inputs | {"skip_blocks": (1,)} for inputs in BATCHES]
    losses, gradients = _ordinary(variant, ["attn.qkv", "mlp.fc1"], autocast=True, batches=batches)
    found_losses, found, _ = _layer_major(
        variant, ["attn.qkv", "mlp.fc1"], autocast=True, batches=batches, blocks_to_swap=3, offload_activations=True
    )
    assert all(torch.equal(a, b) for a, b in zip(losses, found_losses, strict=True))
    _same_gradients(gradients, found)


def test_bytes_do_not_grow_with_the_number_of_micro_batches():
    one = _layer_major("sd35-large", ["attn.qkv"], batches=BATCHES[:1], blocks_to_swap=3)[2]
    three = _layer_major("sd35-large", ["attn.qkv"], blocks_to_swap=3)[2]
    assert three == one > 0


def test_the_micro_batch_at_work_is_always_told():
    told = []
    _layer_major("sd3-medium", ["attn.qkv"], blocks_to_swap=1, select=told.append)
    forward = A * (1 + 3 + 1)  # embedding, three blocks, the final layer
    backward = A * 3
    assert told == list(range(A)) * ((forward + backward) // A)


@pytest.mark.long
def test_block_inputs_are_on_their_way_back_before_they_are_asked_for(monkeypatch):
    late = []
    start_back = ActivationStore.start_back

    def noted(self, offloaded):
        if offloaded.transfer.returning is None:
            late.append(inspect.stack()[1].function)
        start_back(self, offloaded)

    monkeypatch.setattr(ActivationStore, "start_back", noted)
    _layer_major("sd35-large", ["attn.qkv", "context_embedder"], blocks_to_swap=3, offload_activations=True)
    assert late.count("expect") == 2 * (3 * A - 1)  # context and x of three blocks
    assert late.count("load") == 2  # only the very first ones
