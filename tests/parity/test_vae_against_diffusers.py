"""The VAE computes what diffusers' AutoencoderKL computes, encoding and decoding."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from support.comparing import relative_error
from support.tiny_parts import TINY_VAE, random_tensors

from sd3pipe.models.vae import VAE

WEIGHTS = random_tensors(TINY_VAE.shapes(), torch.float32, seed=3)
CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": list(TINY_VAE.level_widths),
    "layers_per_block": TINY_VAE.blocks_per_level,
    "latent_channels": TINY_VAE.latent_channels,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=["fp32", "fp64"]
)
SIZES = pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (1, 8, 12), (3, 12, 8)], ids=["1", "3", "wide", "tall-3"]
)


@pytest.fixture(scope="module")
def both():
    oracle = AutoencoderKL(**CONFIG)
    oracle.load_state_dict(convert_ldm_vae_checkpoint(WEIGHTS, CONFIG))
    ours = VAE(TINY_VAE)
    ours.load_state_dict(WEIGHTS)
    return ours.eval().requires_grad_(False), oracle.eval().requires_grad_(False)


def _random(*shape, dtype):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype) * 2 - 1


@PRECISIONS
@SIZES
def test_moments_equal_autoencoderkls(both, batch, height, width, dtype, tolerance):
    ours, oracle = both[0].to(dtype), both[1].to(dtype)
    pixels_BCHW = _random(batch, 3, 8 * height, 8 * width, dtype=dtype)
    mean, logvar = ours.encode(pixels_BCHW)
    expected = oracle.encode(pixels_BCHW).latent_dist
    assert mean.shape == (batch, 16, height, width)
    assert relative_error(mean, expected.mean) < tolerance
    assert relative_error(logvar, expected.logvar) < tolerance


@pytest.mark.long
@PRECISIONS
@SIZES
def test_decoded_pixels_equal_autoencoderkls(both, batch, height, width, dtype, tolerance):
    ours, oracle = both[0].to(dtype), both[1].to(dtype)
    latents_BChw = _random(batch, 16, height, width, dtype=dtype) * 3
    pixels_BCHW = ours.decode(latents_BChw)
    assert pixels_BCHW.shape == (batch, 3, 8 * height, 8 * width)
    assert relative_error(pixels_BCHW, oracle.decode(latents_BChw).sample) < tolerance


def test_log_variance_is_clamped_as_autoencoderkls(both):
    ours, oracle = both[0].float(), both[1].float()
    with torch.no_grad():
        for model in (ours, oracle):
            model.encoder.conv_out.weight.mul_(100)
    try:
        pixels_BCHW = _random(1, 3, 64, 64, dtype=torch.float32)
        _, logvar = ours.encode(pixels_BCHW)
        assert logvar.min() == -30 and logvar.max() == 20
        assert relative_error(logvar, oracle.encode(pixels_BCHW).latent_dist.logvar) < 1e-4
    finally:
        with torch.no_grad():
            for model in (ours, oracle):
                model.encoder.conv_out.weight.div_(100)
