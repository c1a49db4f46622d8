"""The straight path from picture to noise, whoever walks it: noising, its velocity, its clock. All in fp32.

The words are those of Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(arXiv:2403.03206), sections 2 and 3; their t is called sigma here, and the model's timestep is 1000 * sigma.

    B batch, C latent channels, h w latent pixels
"""

from torch import Tensor


def shift_sigmas(sigmas_B: Tensor, shift: Tensor | float) -> Tensor:
    """Moves noise levels towards noise for shift > 1: k s / (1 + (k - 1) s) (paper, eq. 23)."""
    return shift * sigmas_B / (1 + (shift - 1) * sigmas_B)


def add_noise(latents_BChw: Tensor, noise_BChw: Tensor, sigmas_B: Tensor) -> Tensor:
    """Returns (1 - sigma) x_0 + sigma epsilon in fp32 (paper, eq. 13)."""
    sigmas_B111 = per_sample(sigmas_B)
    return (1 - sigmas_B111) * latents_BChw.float() + sigmas_B111 * noise_BChw.float()


def velocity_target(latents_BChw: Tensor, noise_BChw: Tensor) -> Tensor:
    """Returns the velocity that the model is to predict, epsilon - x_0, in fp32."""
    return noise_BChw.float() - latents_BChw.float()


def per_sample(values_B: Tensor) -> Tensor:
    """Returns one number of each sample, to be multiplied with its picture."""
    return values_B.float().view(-1, 1, 1, 1)
