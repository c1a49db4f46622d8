"""The sampler against StableDiffusion3Pipeline with its FlowMatchEulerDiscreteScheduler, on the same tiny weights."""

import pytest
import torch
from support.comparing import relative_error
from support.tiny_base import write_tiny_base

from sd3pipe.diffusion.sampler import (
    DEFAULTS,
    SamplingSettings,
    SkipLayerGuidance,
    TextCondition,
    decode_pictures,
    sample_latents,
    sampling_sigmas,
    start_noise,
)
from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.models.vae import to_model_space

# Both run the same fp32 sums in another order; 12 steps of a random model let rounding grow to about 1e-6.
TOLERANCE = 2e-5
STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"), layout="diffusers", depth=3)


@pytest.fixture(scope="module")
def pipeline(base):
    from diffusers import StableDiffusion3Pipeline

    parts = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.model, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def mmdit(base):
    return load_mmdit(base.model)


@pytest.fixture(scope="module")
def texts(base):
    architecture = base.architecture.mmdit
    generator = torch.Generator().manual_seed(4)

    def text(tokens):
        context = torch.randn(1, tokens, architecture.context_width, generator=generator)
        return TextCondition(context=context, pooled=torch.randn(1, architecture.pooled_width, generator=generator))

    return text(21), text(21)


def oracle_latents(pipeline, texts, noise, settings):
    positive, negative = texts
    skip = settings.skip_layers
    options = {}
    if skip is not None:
        options = {
            "skip_guidance_layers": list(skip.blocks),
            "skip_layer_guidance_scale": skip.scale,
            "skip_layer_guidance_start": skip.start,
            "skip_layer_guidance_stop": skip.stop,
        }
    return pipeline(
        prompt_embeds=positive.context,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.context,
        negative_pooled_prompt_embeds=negative.pooled,
        latents=noise.clone(),
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_inference_steps=settings.steps,
        guidance_scale=settings.scale,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_sigmas_equal_the_schedulers(pipeline, steps):
    pipeline.scheduler.set_timesteps(steps)
    torch.testing.assert_close(sampling_sigmas(steps), pipeline.scheduler.sigmas, rtol=0, atol=2e-7)
    if steps > 1:
        assert sampling_sigmas(steps)[-2].item() == pytest.approx(0.008929, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(steps=STEPS, scale=4.5),
        SamplingSettings(steps=4, scale=1.0),
        SamplingSettings(steps=STEPS, scale=4.5, skip_layers=SkipLayerGuidance(scale=2.8, blocks=(1,), stop=0.4)),
    ],
    ids=["guided", "turbo", "skip-layers"],
)
def test_latents_equal_the_pipelines(pipeline, mmdit, texts, settings, height, width):
    noise = start_noise([7, 8], height_px=height, width_px=width)
    expected = torch.cat([oracle_latents(pipeline, texts, picture, settings) for picture in noise.split(1)])
    actual = to_model_space(sample_latents(mmdit, *texts, noise_BChw=noise, settings=settings))
    assert relative_error(actual, expected) < TOLERANCE


def test_skip_layers_change_the_picture(mmdit, texts):
    noise = start_noise([7], height_px=64, width_px=64)
    plain = SamplingSettings(steps=STEPS, scale=4.5)
    skipping = SamplingSettings(steps=STEPS, scale=4.5, skip_layers=SkipLayerGuidance(blocks=(1,), stop=0.4))
    drawn = [sample_latents(mmdit, *texts, noise_BChw=noise, settings=settings) for settings in (plain, skipping)]
    assert relative_error(*drawn) > 1e-3


def test_texts_of_different_lengths_give_what_each_would_alone(mmdit, texts):
    positive, negative = texts
    short = TextCondition(context=negative.context[:, :9], pooled=negative.pooled)
    noise = start_noise([1], height_px=32, width_px=32)
    sigma, following = sampling_sigmas(1).tolist()
    timesteps = torch.full((1,), 1000 * sigma)
    cond = mmdit(noise, timesteps, positive.context, positive.pooled)
    uncond = mmdit(noise, timesteps, short.context, short.pooled)
    expected = noise + (following - sigma) * (uncond + 3 * (cond - uncond))
    drawn = sample_latents(mmdit, positive, short, noise_BChw=noise, settings=SamplingSettings(steps=1, scale=3.0))
    assert relative_error(to_model_space(drawn), expected) < TOLERANCE


def test_pictures_equal_the_pipelines(base, pipeline, mmdit, texts):
    noise = start_noise([3], height_px=64, width_px=64)
    latents = sample_latents(mmdit, *texts, noise_BChw=noise, settings=SamplingSettings(steps=4, scale=1.0))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents, return_dict=False)[0]
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    actual = decode_pictures(load_vae(base.model), latents).numpy() / 255
    assert abs(actual - expected).max() <= 0.5 / 255 + 1e-4  # rounding to whole levels


def test_defaults_of_the_variants():
    drawn = {variant: (settings.steps, settings.scale, settings.shift) for variant, settings in DEFAULTS.items()}
    assert drawn == {
        "sd3-medium": (28, 7.0, 3.0),
        "sd35-medium": (40, 4.5, 3.0),
        "sd35-large": (28, 3.5, 3.0),
        "sd35-large-turbo": (4, 1.0, 3.0),
    }
