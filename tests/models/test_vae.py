"""The VAE's keys and shapes are the checkpoint's, told from the tensors; latents are unscaled."""

import pytest
import torch
from support.tiny_parts import TINY_VAE, random_tensors

from sd3pipe.errors import InputError
from sd3pipe.models.vae import SCALE, SHIFT, VAE, draw_latents, from_model_space, to_model_space
from sd3pipe.models.vae_architecture import VAEArchitecture, detect_vae

REAL = VAEArchitecture()


def _meta_shapes(architecture):
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in VAE(architecture).state_dict().items()}


@pytest.mark.parametrize("architecture", [REAL, TINY_VAE], ids=["real", "tiny"])
def test_module_has_the_keys_and_shapes_of_its_architecture(architecture):
    assert _meta_shapes(architecture) == architecture.shapes()


def test_real_vae_has_the_published_size():
    shapes = REAL.shapes()
    assert len(shapes) == 244
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_819_683
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert not any("quant_conv" in key for key in shapes)


@pytest.mark.parametrize(
    "architecture",
    [REAL, TINY_VAE, VAEArchitecture(level_widths=(32, 32), blocks_per_level=1, latent_channels=4)],
    ids=["real", "tiny", "two levels"],
)
def test_architecture_is_told_from_the_shapes_alone(architecture):
    shapes = architecture.shapes()
    assert detect_vae(dict(sorted(shapes.items())), "x") == architecture


@pytest.mark.parametrize("key", ["decoder.conv_in.weight", "encoder.conv_in.weight", "encoder.mid.attn_1.q.bias"])
def test_missing_key_is_named(key):
    shapes = TINY_VAE.shapes()
    del shapes[key]
    with pytest.raises(InputError, match=rf"^some/file: .*{key}"):
        detect_vae(shapes, "some/file")


def test_wrong_shape_and_unknown_key_are_named():
    with pytest.raises(
        InputError, match=r"the VAE has tensors of unexpected shape.*norm_out.bias is \[5\] and should be \[96\]"
    ):
        detect_vae(TINY_VAE.shapes() | {"encoder.norm_out.bias": (5,)}, "x")
    with pytest.raises(InputError, match=r"not understood: encoder\.extra"):
        detect_vae(TINY_VAE.shapes() | {"encoder.extra": (5,)}, "x")
    with pytest.raises(InputError, match="four axes"):
        detect_vae(TINY_VAE.shapes() | {"decoder.conv_in.weight": (5,)}, "x")


def test_shapes_that_make_no_vae_are_refused_not_crashed_on():
    narrow = VAEArchitecture(level_widths=(16, 32)).shapes()
    with pytest.raises(InputError, match="no multiples of 32"):
        detect_vae(narrow, "x")
    with pytest.raises(InputError):
        detect_vae({"decoder.conv_in.weight": (0, 0, 0, 0), "encoder.conv_in.weight": (0, 0, 0, 0)}, "x")


@pytest.fixture(scope="module")
def vae():
    vae = VAE(TINY_VAE)
    vae.load_state_dict(random_tensors(TINY_VAE.shapes(), torch.float32, seed=0))
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16)])
def test_pictures_of_unfit_shape_are_refused(vae, shape):
    with pytest.raises(ValueError, match="pixels of shape"):
        vae.encode(torch.zeros(shape))


def test_latents_of_unfit_shape_are_refused(vae):
    with pytest.raises(ValueError, match="latents of shape"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(vae):
    pixels_BCHW = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean_B, _ = vae.encode(pixels_BCHW)
    for index in range(3):
        mean, _ = vae.encode(pixels_BCHW[index : index + 1])
        assert (mean_B[index] - mean[0]).abs().max() < 1e-4  # rounding; the values are of order one


def test_model_space_is_shifted_then_scaled_and_comes_back():
    latents = torch.tensor([SHIFT, SHIFT + 1.0, -2.0], dtype=torch.float64)
    assert torch.allclose(to_model_space(latents)[:2], torch.tensor([0.0, SCALE], dtype=torch.float64))
    assert torch.allclose(from_model_space(to_model_space(latents)), latents)


def test_sample_has_the_moments():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.full((100_000,), 3.0), torch.full((100_000,), 0.5).log() * 2
    drawn = draw_latents(mean, logvar, torch.randn(100_000, generator=generator))
    assert abs(drawn.mean().item() - 3) < 0.01  # six standard errors
    assert abs(drawn.std().item() - 0.5) < 0.007
