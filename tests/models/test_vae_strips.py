"""Strips change nothing but rounding, whatever their height, so there is no seam."""

import pytest
import torch
from skimage import data
from support.comparing import relative_error
from support.tiny_parts import TINY_VAE, random_tensors

from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.models.vae_strips import (
    decode_bytes,
    decode_in_strips,
    decode_within,
    encode_bytes,
    encode_in_strips,
    encode_within,
    usable_memory,
)

ONE_ROW_PAIR = 1  # fewer bytes than any row, so strips of two rows
SOME_ROWS = 32 * 48 * 4 * 10  # ten rows of the finest level: the last strip is shorter


@pytest.fixture(scope="module")
def vae():
    vae = VAE(TINY_VAE).double()
    vae.load_state_dict(random_tensors(TINY_VAE.shapes(), torch.float64, seed=4))
    return vae.eval().requires_grad_(False)


def _largest_error_in_rows(found, expected):
    return (found - expected).abs().amax(dim=(0, 1, 3)) / expected.std()


@pytest.mark.parametrize("strip_bytes", [ONE_ROW_PAIR, 2 * SOME_ROWS, 1 << 40])
@pytest.mark.parametrize("height, width", [(48, 48), (72, 48), (48, 72)])
def test_encoding_in_strips_equals_encoding_whole(vae, height, width, strip_bytes):
    pixels_BCHW = (
        torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    )
    before = pixels_BCHW.clone()
    expected = vae.encode(pixels_BCHW)
    found = encode_in_strips(vae, pixels_BCHW, strip_bytes=strip_bytes)
    assert torch.equal(pixels_BCHW, before)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-12  # double rounds at 1e-16; some 50 layers lie between


@pytest.mark.parametrize("strip_bytes", [ONE_ROW_PAIR, 2 * SOME_ROWS, 1 << 40])
@pytest.mark.parametrize("height, width", [(6, 6), (9, 6), (6, 9)])
def test_decoding_in_strips_equals_decoding_whole(vae, height, width, strip_bytes):
    latents_BChw = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = decode_in_strips(vae, latents_BChw, strip_bytes=strip_bytes)
    assert relative_error(found, vae.decode(latents_BChw)) < 1e-12


@pytest.mark.slow
def test_no_row_of_a_photograph_shows_a_seam(vae):
    """In float32, rows at a strip's border are as near to the whole picture's result as all others."""
    single = VAE(TINY_VAE)
    single.load_state_dict(vae.state_dict())
    single.eval().requires_grad_(False)
    pixels_BCHW = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, _ = single.encode(pixels_BCHW)
    found, _ = encode_in_strips(single, pixels_BCHW, strip_bytes=1 << 20)
    assert _largest_error_in_rows(found, mean).max() < 1e-3
    pixels = single.decode(mean)
    assert _largest_error_in_rows(decode_in_strips(single, mean, strip_bytes=1 << 20), pixels).max() < 1e-3


@pytest.mark.slow  # many processors have no quick products in bfloat16
def test_bfloat16_stays_bfloat16_with_norms_in_float32(vae):
    half = VAE(TINY_VAE).bfloat16()
    half.load_state_dict({key: tensor.bfloat16() for key, tensor in vae.state_dict().items()})
    half.eval().requires_grad_(False)
    latents_BChw = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = half.decode(latents_BChw)
    found = decode_in_strips(half, latents_BChw, strip_bytes=ONE_ROW_PAIR)
    exact = vae.decode(latents_BChw.double())
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), exact) < 1.5 * relative_error(whole.double(), exact)


def test_wrong_sizes_are_refused_as_by_the_vae(vae):
    with pytest.raises(ValueError, match="multiples of 8"):
        encode_in_strips(vae, torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match=r"\[B, 16, h, w\]"):
        decode_in_strips(vae, torch.zeros(1, 4, 8, 8))


def test_memory_of_a_whole_picture_counts_the_finest_level():
    assert encode_bytes(VAEArchitecture(), 1024 * 1024, itemsize=4) == 3 * 128 * 2**20 * 4
    assert decode_bytes(VAEArchitecture(), 1024 * 1024, itemsize=4) == 3 * 256 * 2**20 * 4


def test_strips_are_used_only_where_the_whole_does_not_fit(vae, monkeypatch):
    taken = []
    monkeypatch.setattr("sd3pipe.models.vae_strips.encode_in_strips", lambda *_: taken.append("encode"))
    monkeypatch.setattr("sd3pipe.models.vae_strips.decode_in_strips", lambda *_: taken.append("decode"))
    pixels_BCHW = torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    latents_BChw = torch.zeros(2, 16, 2, 3, dtype=torch.float64)
    to_encode = encode_bytes(TINY_VAE, 2 * 16 * 24, 8)
    to_decode = decode_bytes(TINY_VAE, 2 * 16 * 24, 8)
    for limit in (to_encode, None):
        encode_within(vae, pixels_BCHW, limit)
    for limit in (to_decode, None):
        decode_within(vae, latents_BChw, limit)
    assert taken == []
    encode_within(vae, pixels_BCHW, to_encode - 1)
    decode_within(vae, latents_BChw, to_decode - 1)
    assert taken == ["encode", "decode"]


def test_on_the_cpu_there_is_no_limit():
    assert usable_memory(torch.device("cpu"), beside_others=True) is None
    assert usable_memory(torch.device("cpu"), beside_others=False) is None
