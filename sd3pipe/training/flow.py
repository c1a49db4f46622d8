"""Rectified flow as SD3 was trained with it: how noise levels are drawn, weighting, loss. All in fp32.

The words are those of Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(arXiv:2403.03206), sections 2 and 3; their t is called sigma here, and the model's timestep is 1000 * sigma. The x0
form and the meaning of a scheme under it are those of kohya-ss/sd-scripts (library/sd3_train_utils.py).

    B batch, C latent channels, h w latent pixels
"""

import math
from typing import Literal

import torch
from torch import Tensor

from sd3pipe.diffusion.flow import add_noise as add_noise  # who trains finds it here
from sd3pipe.diffusion.flow import per_sample, shift_sigmas, velocity_target
from sd3pipe.rules.flow import NUM_TIMESTEPS, LossRules, NoiseScheme, SigmaSampling
from sd3pipe.words import LossForm, LossType, MaskedLoss, WeightingScheme

_SMALLEST_SIGMA = 1 / NUM_TIMESTEPS  # sigma_sqrt weighs sigma 0 as the first noisy timestep: its own weight is infinite


def sample_sigmas(uniform_B: Tensor, pixels_B: Tensor, sampling: SigmaSampling) -> Tensor:
    """Returns the noise levels sigmas_B in [0, 1], fp32, that belong to uniform draws in [0, 1).

    Each scheme is monotonic in the draw (mode falls, the others rise), so evenly spread draws give even quantiles.
    `pixels_B` is width x height of each sample's picture, which only training_shift = "auto" reads. Under the x0 form
    timesteps are whole numbers, as in sd-scripts; under the velocity form they are continuous, as in the paper.
    """
    times_B = scheme_times(uniform_B.double(), sampling)
    times_B = shift_sigmas(times_B, training_shifts(pixels_B, sampling.training_shift))
    timesteps_B = sampling.min_timestep + times_B * (sampling.max_timestep - sampling.min_timestep)
    if sampling.loss_form == "x0":
        timesteps_B = timesteps_B.floor()
    return (timesteps_B / NUM_TIMESTEPS).float()


def scheme_times(uniform_B: Tensor, sampling: SigmaSampling) -> Tensor:
    """Returns the scheme's times in [0, 1] for uniform draws, before shift and limits (paper, section 3.1)."""
    match sampling.weighting_scheme:
        case "logit_normal":  # eq. 19, by its quantile function
            return torch.sigmoid(sampling.logit_mean + sampling.logit_std * torch.special.ndtri(uniform_B))
        case "mode":  # eq. 20
            bend_B = torch.cos(math.pi / 2 * uniform_B).square() - 1 + uniform_B
            return (1 - uniform_B - sampling.mode_scale * bend_B).clamp(0, 1)
        case "cosmap" if sampling.loss_form == "velocity":  # eq. 21; under x0 cosmap is a weight
            return 1 - 1 / (torch.tan(math.pi / 2 * uniform_B) + 1)
        case _:
            return uniform_B


def training_shifts(pixels_B: Tensor, training_shift: float | Literal["auto"]) -> Tensor:
    """Returns each sample's shift: the number, or 3 at 1024 x 1024 pixels, growing with the side, and never under 1."""
    if training_shift == "auto":
        return (3 * (pixels_B.double() / 1024**2).sqrt()).clamp(min=1)
    return torch.full_like(pixels_B, training_shift, dtype=torch.float64)


def loss(
    velocity_BChw: Tensor,
    latents_BChw: Tensor,
    noise_BChw: Tensor,
    sigmas_B: Tensor,
    *,
    weighting_scheme: WeightingScheme,
    loss_form: LossForm,
    loss_type: LossType = "l2",
) -> Tensor:
    """Returns the weighted loss of each sample, loss_B, in fp32, with every other rule as it is by default."""
    rules = LossRules(weighting_scheme=weighting_scheme, loss_form=loss_form, loss_type=loss_type)
    return losses(velocity_BChw, latents_BChw, noise_BChw, sigmas_B, rules)


def losses(
    velocity_BChw: Tensor,
    latents_BChw: Tensor,
    noise_BChw: Tensor,
    sigmas_B: Tensor,
    rules: LossRules,
    *,
    mask_Bhw: Tensor | None = None,
    target_BChw: Tensor | None = None,
) -> Tensor:
    """Returns the weighted loss of each sample, loss_B, in fp32.

    The x0 form compares x_sigma - sigma v with x_0; that error is sigma times the velocity's, and is computed so.
    `target_BChw` replaces epsilon - x_0 as the wanted velocity (differential output preservation). A mask weighs latent
    pixels with values in [0, 1]: its loss is the mean over the masked area, or over the whole picture as in sd-scripts.
    """
    target = velocity_target(latents_BChw, noise_BChw) if target_BChw is None else target_BChw.float()
    weights_B, error_scale_B = loss_weights(sigmas_B, rules)
    errors_BChw = per_sample(error_scale_B) * (velocity_BChw.float() - target)
    penalties_BChw = _penalties(errors_BChw, rules.loss_type, huber_thresholds(sigmas_B, rules))
    return weights_B * _mean(penalties_BChw, mask_Bhw, rules.masked_loss)


def loss_weights(sigmas_B: Tensor, rules: NoiseScheme) -> tuple[Tensor, Tensor]:
    """Returns the weight of each sample's penalty, and the scale of its velocity error inside the penalty.

    Under l2 the effective weight of the squared velocity error is weight x scale^2.
    """
    sigmas_B = sigmas_B.float()
    ones_B = torch.ones_like(sigmas_B)
    if rules.loss_form == "velocity":
        return ones_B, ones_B
    if rules.weighting_scheme == "sigma_sqrt":
        sigmas_B = sigmas_B.clamp(min=_SMALLEST_SIGMA)
        return sigmas_B**-2, sigmas_B
    if rules.weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas_B + 2 * sigmas_B.square())), sigmas_B
    return ones_B, sigmas_B


def huber_thresholds(sigmas_B: Tensor, rules: LossRules) -> Tensor:
    """Returns c for each sample: constant, or falling from 1 at sigma 0 to huber_c at sigma 1, times huber_scale.

    snr is sd-scripts' rule for the older models, (1 - c) / (1 + noise-to-signal)^2 + c, where a flow's noise-to-signal
    ratio is sigma / (1 - sigma).
    """
    sigmas_B = sigmas_B.float()
    match rules.huber_schedule:
        case "constant":
            thresholds_B = torch.full_like(sigmas_B, rules.huber_c)
        case "exponential":
            thresholds_B = torch.exp(sigmas_B * math.log(rules.huber_c))
        case "snr":
            thresholds_B = (1 - rules.huber_c) * (1 - sigmas_B).square() + rules.huber_c
    return thresholds_B * rules.huber_scale


def _penalties(errors_BChw: Tensor, loss_type: LossType, thresholds_B: Tensor) -> Tensor:
    """Returns the penalty of each error; huber is 2c (sqrt(d^2 + c^2) - c), smooth_l1 the same without the factor c."""
    match loss_type:
        case "l2":
            return errors_BChw.square()
        case "l1":
            return errors_BChw.abs()
        case "huber" | "smooth_l1":
            c_B111 = per_sample(thresholds_B)
            # sqrt(d^2 + c^2) - c without its cancellation at small d
            rises_BChw = errors_BChw.square() / ((errors_BChw.square() + c_B111.square()).sqrt() + c_B111)
            return 2 * rises_BChw * c_B111 if loss_type == "huber" else 2 * rises_BChw


def _mean(values_BChw: Tensor, mask_Bhw: Tensor | None, masked_loss: MaskedLoss) -> Tensor:
    """Returns each sample's mean, over its mask's area if there is a mask; an empty mask gives 0, not NaN."""
    if mask_Bhw is None:
        return values_BChw.mean(dim=(1, 2, 3))
    mask_B1hw = mask_Bhw.float().unsqueeze(1)
    means_B = (values_BChw * mask_B1hw).mean(dim=(1, 2, 3))
    if masked_loss == "sum":
        return means_B
    areas_B = mask_B1hw.mean(dim=(1, 2, 3))
    return means_B / torch.where(areas_B > 0, areas_B, 1)
