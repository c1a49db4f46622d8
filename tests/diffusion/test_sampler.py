"""Noise, refusals and small rules of the sampler; its numbers are compared with diffusers in tests/parity."""

import pytest
import torch
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.diffusion.sampler import SamplingSettings, SkipLayerGuidance, TextCondition, sample_latents, start_noise
from sd3pipe.errors import ParameterError


def test_noise_of_a_seed_depends_on_nothing_else():
    together = start_noise([5, 6], height_px=64, width_px=96)
    alone = start_noise([6], height_px=64, width_px=96)
    assert together.shape == (2, 16, 8, 12)
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("height", "width"), [(64, 72), (0, 64), (63, 64)])
def test_sizes_that_cannot_be_patched_are_refused(height, width):
    with pytest.raises(ParameterError, match=f"{width} x {height} pixels"):
        start_noise([1], height_px=height, width_px=width)


@pytest.mark.parametrize(
    ("steps", "active"), [(50, list(range(1, 10))), (40, list(range(1, 8))), (28, list(range(1, 6))), (4, [])]
)
def test_skip_layers_act_strictly_between_start_and_stop(steps, active):
    assert [step for step in range(steps) if SkipLayerGuidance().acts_at(step, steps)] == active


@pytest.fixture(scope="module")
def tiny():
    mmdit = tiny_mmdit("sd35-medium").eval()
    inputs = random_inputs(batch=1)
    return mmdit, TextCondition(context=inputs["context_BLD"], pooled=inputs["pooled_BP"])


def test_skipping_blocks_that_do_not_exist_is_refused(tiny):
    mmdit, text = tiny
    settings = SamplingSettings(steps=2, scale=1.0, skip_layers=SkipLayerGuidance())
    noise = start_noise([1], height_px=32, width_px=32)
    with pytest.raises(ParameterError, match=r"blocks \[7, 8, 9\] cannot be skipped: the model has blocks 0 to 2"):
        sample_latents(mmdit, text, None, noise_BChw=noise, settings=settings)


def test_no_steps_are_refused(tiny):
    mmdit, text = tiny
    with pytest.raises(ParameterError, match="steps = 0"):
        noise = start_noise([1], height_px=32, width_px=32)
        sample_latents(mmdit, text, None, noise_BChw=noise, settings=SamplingSettings(steps=0, scale=1.0))


def test_sampling_counts_its_steps_and_needs_no_gradient(tiny):
    mmdit, text = tiny
    counted = []
    latents = sample_latents(
        mmdit,
        text,
        None,
        noise_BChw=start_noise([1], height_px=32, width_px=32).requires_grad_(),
        settings=SamplingSettings(steps=3, scale=1.0),
        on_step=lambda: counted.append(1),
    )
    assert len(counted) == 3
    assert not latents.requires_grad
