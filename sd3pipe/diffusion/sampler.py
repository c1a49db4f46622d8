"""Draws latents with an MMDiT: Euler steps along the flow, classifier-free guidance, skip-layer guidance. fp32 state.

The schedule and the guidance are those of Stability AI's sd3.5 reference (sd3_impls.py), which diffusers'
StableDiffusion3Pipeline with its FlowMatchEulerDiscreteScheduler follows to the last step.
"""

# B batch, C latent channels, h w latent pixels, H W pixels, L text tokens, D text width, P pooled width, N steps

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3pipe import stopping
from sd3pipe.diffusion.flow import shift_sigmas
from sd3pipe.errors import ParameterError
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.vae import VAE, from_model_space
from sd3pipe.models.vae_strips import decode_within, usable_memory
from sd3pipe.rules.flow import NUM_TIMESTEPS
from sd3pipe.words import Variant

SHIFT = 3.0  # every SD3 model is sampled with it
PIXELS_PER_LATENT = 8
SIDE_MULTIPLE_PX = 16  # 8 x VAE, 2 x patches


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayerGuidance:
    """Pushes away from what the model predicts without some blocks, early in the schedule (for SD3.5-medium)."""

    scale: float = 2.5
    blocks: tuple[int, ...] = (7, 8, 9)
    start: float = 0.01  # of the steps, exclusive
    stop: float = 0.20

    def acts_at(self, step: int, num_steps: int) -> bool:
        return num_steps * self.start < step < num_steps * self.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How latents are drawn; scale 1 and less means no guidance, and so no negative prompt."""

    steps: int
    scale: float
    shift: float = SHIFT
    skip_layers: SkipLayerGuidance | None = None


DEFAULTS: dict[Variant, SamplingSettings] = {
    "sd3-medium": SamplingSettings(steps=28, scale=7.0),
    "sd35-medium": SamplingSettings(steps=40, scale=4.5),
    "sd35-large": SamplingSettings(steps=28, scale=3.5),
    "sd35-large-turbo": SamplingSettings(steps=4, scale=1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCondition:
    """What the MMDiT reads of prompts: context [B, L, D] in the text encoders' width, pooled [B, P]."""

    context: Tensor
    pooled: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextCondition":
        """Returns the condition on a device, in the number format that the model computes in."""
        return TextCondition(context=self.context.to(device, dtype), pooled=self.pooled.to(device, dtype))


def sampling_sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Returns the steps + 1 noise levels from 1 to 0, fp32.

    The reference spaces timesteps evenly down to the already shifted first one and then shifts them all, so the low end
    is shifted twice: the last level before 0 is 0.0089 at shift 3, whatever the number of steps.
    """
    if steps < 1:
        raise ParameterError(f"steps = {steps}: at least one step is needed to draw a picture")
    lowest = shift_sigmas(torch.tensor(1 / NUM_TIMESTEPS, dtype=torch.float64), shift)
    sigmas_N = shift_sigmas(torch.linspace(1, lowest.item(), steps, dtype=torch.float64), shift)
    return torch.cat([sigmas_N, torch.zeros(1, dtype=torch.float64)]).float()


def start_noise(seeds: Sequence[int], *, height_px: int, width_px: int, channels: int = 16) -> Tensor:
    """Returns the noise [B, C, h, w] that a picture of each seed begins with, drawn on the CPU in fp32."""
    if height_px % SIDE_MULTIPLE_PX or width_px % SIDE_MULTIPLE_PX or min(height_px, width_px) <= 0:
        raise ParameterError(
            f"a picture of {width_px} x {height_px} pixels cannot be drawn: both sides must be multiples of "
            f"{SIDE_MULTIPLE_PX}"
        )
    shape = (1, channels, height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(noise)


@torch.no_grad()
def sample_latents(
    mmdit: MMDiT,
    positive: TextCondition,
    negative: TextCondition | None,
    *,
    noise_BChw: Tensor,
    settings: SamplingSettings,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Returns unscaled latents [B, C, h, w], fp32, as the VAE decodes them.

    `negative` is the prompt that guidance moves away from; it may be None where settings.scale is at most 1. The model
    must be in eval mode. Raises ParameterError where blocks to skip do not exist, Stopped when asked to stop.
    """
    if mmdit.training:
        raise AssertionError("samples are drawn in eval mode")
    if settings.scale > 1 and negative is None:
        raise AssertionError("guidance needs a negative prompt, at least the empty one")
    depth = mmdit.architecture.depth
    if settings.skip_layers is not None and (missing := [b for b in settings.skip_layers.blocks if b >= depth]):
        raise ParameterError(f"blocks {missing} cannot be skipped: the model has blocks 0 to {depth - 1}")
    latents_BChw = noise_BChw.float()
    sigmas = sampling_sigmas(settings.steps, settings.shift)
    for step, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        stopping.check()
        velocity_BChw = _guided_velocity(mmdit, latents_BChw, sigma, positive, negative, settings, step)
        latents_BChw = latents_BChw + (following - sigma) * velocity_BChw
        if on_step is not None:
            on_step()
    return from_model_space(latents_BChw)


@torch.no_grad()
def decode_pictures(vae: VAE, latents_BChw: Tensor) -> Tensor:
    """Returns pictures [B, H, W, 3], uint8 on the CPU, of unscaled latents; in strips where memory is short."""
    parameter = next(vae.parameters())
    memory_bytes = usable_memory(parameter.device, beside_others=True)
    pixels_BCHW = decode_within(vae, latents_BChw.to(parameter), memory_bytes).float()
    return ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _guided_velocity(
    mmdit: MMDiT,
    latents_BChw: Tensor,
    sigma: float,
    positive: TextCondition,
    negative: TextCondition | None,
    settings: SamplingSettings,
    step: int,
) -> Tensor:
    """Returns uncond + scale (cond - uncond), plus skip-layer guidance in its range of steps."""
    if settings.scale > 1 and negative is not None:
        cond, uncond = _velocities(mmdit, latents_BChw, sigma, (positive, negative))
        velocity_BChw = uncond + settings.scale * (cond - uncond)
    else:
        (cond,) = _velocities(mmdit, latents_BChw, sigma, (positive,))
        velocity_BChw = cond
    skip = settings.skip_layers
    if skip is not None and skip.acts_at(step, settings.steps):
        (without,) = _velocities(mmdit, latents_BChw, sigma, (positive,), skip.blocks)
        velocity_BChw = velocity_BChw + skip.scale * (cond - without)
    return velocity_BChw


def _velocities(
    mmdit: MMDiT, latents_BChw: Tensor, sigma: float, texts: Sequence[TextCondition], skip_blocks: Sequence[int] = ()
) -> list[Tensor]:
    """Returns the velocity under each text, in one batch where the texts are equally long."""
    if len({text.context.shape[1] for text in texts}) > 1:
        return [_velocities(mmdit, latents_BChw, sigma, (text,), skip_blocks)[0] for text in texts]
    batch, repeated = latents_BChw.shape[0], latents_BChw.repeat(len(texts), 1, 1, 1)
    context_BLD = torch.cat([text.context.expand(batch, -1, -1) for text in texts])
    pooled_BP = torch.cat([text.pooled.expand(batch, -1) for text in texts])
    timesteps_B = torch.full((len(repeated),), sigma * NUM_TIMESTEPS, device=repeated.device)
    velocity_BChw = mmdit(repeated, timesteps_B, context_BLD, pooled_BP, skip_blocks=skip_blocks)
    return list(velocity_BChw.float().chunk(len(texts)))
