"""The key maps equal diffusers' own converters, key for key and value for value, and lose nothing either way."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from support.tiny_mmdit import random_weights, tiny_architecture
from support.tiny_parts import TINY_VAE, random_tensors

from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.diffusers_keys import diffusers_names, mmdit_modules, native_names, vae_modules
from sd3pipe.models.vae_architecture import VAEArchitecture

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]


def _to_diffusers(tensors, modules):
    converted = {}
    for key, tensor in tensors.items():
        found = diffusers_names(key, modules)
        rows = tensor.chunk(len(found.names)) if len(found.names) > 1 else (tensor,)
        if found.halves_swapped:
            rows = (torch.cat(tensor.chunk(2)[::-1]),)
        converted |= dict(zip(found.names, rows, strict=True))
    return converted


@pytest.mark.parametrize("variant", VARIANTS)
def test_mmdit_map_equals_diffusers_converter(variant):
    architecture = tiny_architecture(variant)
    weights = random_weights(architecture)
    expected = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    found = _to_diffusers(weights, mmdit_modules(architecture.depth))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_vae_map_equals_diffusers_converter():
    weights = random_tensors(TINY_VAE.shapes(), torch.float32, seed=0)
    expected = convert_ldm_vae_checkpoint(weights, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    found = _to_diffusers(weights, vae_modules(4, TINY_VAE.blocks_per_level))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].flatten(), expected[key].flatten()) for key in expected)


@pytest.mark.parametrize("depth, dual, qk_norm", [(24, (), False), (24, tuple(range(13)), True), (38, (), True)])
def test_every_mmdit_key_of_the_real_sizes_maps_there_and_back(depth, dual, qk_norm):
    shapes = MMDiTArchitecture(depth=depth, pos_embed_max=192, qk_norm=qk_norm, dual_attention_blocks=dual).shapes()
    _assert_bijective(shapes, mmdit_modules(depth))


def test_every_vae_key_of_the_real_size_maps_there_and_back():
    _assert_bijective(VAEArchitecture().shapes(), vae_modules(4, 2))


def _assert_bijective(native_keys, modules):
    theirs = [name for key in native_keys for name in diffusers_names(key, modules).names]
    assert len(theirs) == len(set(theirs))
    assert native_names(theirs, modules).keys() == set(native_keys)


def test_real_configurations_have_the_mapped_keys(shared_dir):
    folder = shared_dir / "model-configs" / "stable-diffusion-3.5-medium"
    with torch.device("meta"):
        mmdit = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder / "transformer"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    dual = tuple(range(13))
    native = MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=dual).shapes()
    assert native_names(mmdit.state_dict().keys(), mmdit_modules(24)).keys() == native.keys()
    assert native_names(vae.state_dict().keys(), vae_modules(4, 2)).keys() == VAEArchitecture().shapes().keys()
