"""The loss of a training step, and the gradient of every adapter tensor, against diffusers and peft in fp64.

The oracle computes noising, target, weight and penalty by itself, from the formulas. Fused q, k, v of ours are three
layers there, which share A and have a third of B each.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.diffusers_mmdit import diffusers_mmdit, their_names
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.rules.flow import LossRules
from sd3pipe.training.batches import MicroBatch
from sd3pipe.training.feed import Batch
from sd3pipe.training.objective import Objective

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
RANK, ALPHA = 4, 3.0
TOLERANCE = 1e-6  # our flow page is fp32, which rounds latents and velocity by 6e-8
SMALLEST = 1e-8  # of the largest norm: below it a gradient is rounding
HUBER_C = 0.2


def batch_of(inputs) -> Batch:
    """A batch with weights, a mask and noise levels near both ends."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(inputs["latents_BChw"].shape, generator=generator)
    numbers = np.arange(len(latents))
    plan = MicroBatch(
        epoch=0, index=0, pictures=numbers, ids=numbers.astype(np.uint64), latent_rows=numbers, text_rows=numbers
    )
    return Batch(
        plan=plan,
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        sigmas=torch.tensor([0.05, 0.95]),
        context=inputs["context_BLD"],
        pooled=inputs["pooled_BP"],
        weights=torch.tensor([1.0, 0.3]),
        pictures=torch.tensor([0, 1]),
        subsets=torch.tensor([0, 0]),
        dropout_keys=torch.tensor([1, 2]),
        crop_draws=(1.0, 0.0, 0.0),
        mask=torch.rand(latents.shape[0], *latents.shape[-2:], generator=generator),
    )


def our_gradients(variant, batch, rules):
    """Returns loss and gradients by module path and factor, after drawing both factors at random."""
    mmdit = tiny_mmdit(variant, dtype=torch.float64)
    network = attach(mmdit, AdapterSpec(rank=RANK, alpha=ALPHA), dtype=torch.float64)
    for number, layer in enumerate(network.layers.values()):
        torch.nn.init.normal_(layer.up, std=0.2, generator=torch.Generator().manual_seed(number))
    objective = Objective(mmdit, network, rules)
    forward_pass = objective.prepare(batch)
    losses = objective.losses(forward_pass, objective.predict(forward_pass))
    (losses * batch.weights).mean().backward()
    gradients = {
        f"{path}.{name}": parameter.grad
        for path, layer in network.layers.items()
        for name, parameter in layer.named_parameters()
    }
    return (losses * batch.weights).mean().item(), gradients, network


def halves_swapped(path, depth):
    """diffusers' last context norm has scale before shift."""
    return path == f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"


def their_gradients(variant, batch, network, loss_of):
    depth = 3
    paths = list(network.layers)
    targets = [name for path in paths for name in their_names(path)]
    oracle = diffusers_mmdit(variant, torch.float64)
    oracle.requires_grad_(False)
    model = get_peft_model(oracle, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).double()
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in targets}
    with torch.no_grad():
        for path in paths:
            down, up = network.layers[path].down, network.layers[path].up
            up = torch.cat(up.chunk(2)[::-1]) if halves_swapped(path, depth) else up
            names = their_names(path)
            for name, part in zip(names, up.chunk(len(names)), strict=True):
                layers[name].lora_A.default.weight.copy_(down)
                layers[name].lora_B.default.weight.copy_(part)

    latents, noise, sigmas = batch.latents.double(), batch.noise.double(), batch.sigmas.double()
    noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    velocity = model(
        hidden_states=noisy,
        timestep=batch.sigmas * 1000,  # the sinusoid of a timestep is fp32 in every mode
        encoder_hidden_states=batch.context,
        pooled_projections=batch.pooled,
        return_dict=False,
    )[0]
    loss = (loss_of(velocity, latents, noise, sigmas) * batch.weights.double()).mean()
    loss.backward()
    gradients = {}
    for path in paths:
        names = their_names(path)
        up = torch.cat([layers[name].lora_B.default.weight.grad for name in names])
        gradients[f"{path}.up"] = torch.cat(up.chunk(2)[::-1]) if halves_swapped(path, depth) else up
        gradients[f"{path}.down"] = sum(layers[name].lora_A.default.weight.grad for name in names)
    return loss.item(), gradients


def velocity_mse(velocity, latents, noise, sigmas):
    return (velocity - (noise - latents)).square().mean(dim=(1, 2, 3))


def masked_x0_cosmap_huber(mask):
    """sd-scripts' sums (its step 7 to 9) for x0, cosmap, huber with a constant c, mean over the masked area."""

    def loss(velocity, latents, noise, sigmas):
        s = sigmas.view(-1, 1, 1, 1)
        predicted = (1 - s) * latents + s * noise - s * velocity
        penalty = 2 * HUBER_C * (((predicted - latents).square() + HUBER_C**2).sqrt() - HUBER_C)
        weight = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        area = mask.double()[:, None]
        return weight * (penalty * area).mean(dim=(1, 2, 3)) / area.mean(dim=(1, 2, 3))

    return loss


@pytest.mark.parametrize("form", ["velocity", "x0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_oracles(variant, form):
    inputs = random_inputs(batch=2, height=8, width=12, dtype=torch.float64)
    batch = batch_of(inputs)
    if form == "velocity":
        batch, loss_of = dataclasses.replace(batch, mask=None), velocity_mse
        scheme, kind = "logit_normal", "l2"
    else:
        scheme, kind, loss_of = "cosmap", "huber", masked_x0_cosmap_huber(batch.mask)
    rules = LossRules(
        weighting_scheme=scheme,
        loss_form=form,
        loss_type=kind,
        huber_schedule="constant",
        huber_c=HUBER_C,
    )
    loss, found, network = our_gradients(variant, batch, rules)
    expected_loss, expected = their_gradients(variant, batch, network, loss_of)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert found.keys() == expected.keys()
    largest = max(tensor.norm() for tensor in expected.values())
    compared = [name for name, tensor in expected.items() if tensor.norm() > SMALLEST * largest]
    # the last context block's q and its modulation of nothing see no gradient; all the rest is compared
    assert len(compared) > 0.9 * len(expected)
    for name in compared:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < TOLERANCE, f"{name}: {error:.1e}"
