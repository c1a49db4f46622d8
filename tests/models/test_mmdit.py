"""The MMDiT's own promises, apart from parity: keys, sizes, recomputation, skipped blocks, precision, refusals."""

import pytest
import torch
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.errors import InputError
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.linear import Linear, PatchProjection
from sd3pipe.models.mmdit import MMDiT, sinusoid

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
REAL = {
    "sd3-medium": MMDiTArchitecture(depth=24, pos_embed_max=192, qk_norm=False),
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
PARAMETERS = {"sd3-medium": 2_084_951_104, "sd35-medium": 2_469_663_936, "sd35-large": 8_146_280_768}


@pytest.mark.parametrize("variant", VARIANTS)
def test_real_size_on_meta_has_the_published_keys_shapes_and_count(variant):
    model = MMDiT(REAL[variant], device="meta", dtype=torch.bfloat16)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == REAL[variant].shapes()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PARAMETERS[variant]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_blocks_changes_no_bit(variant):
    results = []
    for kept in ("all", "attention", "none"):
        model, inputs = tiny_mmdit(variant), random_inputs()
        model.keep_activations([kept] * model.architecture.depth)
        inputs["context_BLD"].requires_grad_()
        inputs["pooled_BP"].requires_grad_()
        velocity = model(**inputs)
        velocity.square().sum().backward()
        results.append((velocity.detach(), inputs["context_BLD"].grad, inputs["pooled_BP"].grad))
    for plain, *recomputed in zip(*results, strict=True):
        assert all(torch.equal(plain, tensor) for tensor in recomputed)


def test_skipped_block_passes_both_streams_through():
    model, inputs = tiny_mmdit("sd35-medium"), random_inputs()
    seen = []
    model.joint_blocks[1].register_forward_hook(lambda *_: seen.append(1))
    whole = model(**inputs)
    skipped = model(**inputs, skip_blocks=[1])
    assert seen == [1]
    model.joint_blocks[1].forward = lambda context, x, *_: (context, x)
    assert torch.equal(model(**inputs), skipped)
    assert not torch.allclose(whole, skipped, rtol=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_and_autocast_stay_near_fp32(variant):
    inputs = random_inputs()
    exact = tiny_mmdit(variant)(**inputs)
    half = tiny_mmdit(variant, dtype=torch.bfloat16)(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = tiny_mmdit(variant)(**inputs)
    assert half.dtype == autocast.dtype == torch.float32  # the dtype of the latents
    for rough in (half, autocast):
        assert 1e-6 < (rough - exact).norm() / exact.norm() < 0.05  # bf16 keeps 8 bits: 0.4 % a rounding


def test_position_table_is_loaded_not_computed():
    model, inputs = tiny_mmdit("sd35-large"), random_inputs()
    before = model(**inputs)
    model.pos_embed[0, 5 * 12 + 5] += 1  # in the middle 4 x 4 of 12 x 12
    changed = model(**inputs)
    assert not torch.allclose(before, changed)
    model.pos_embed[0, 0] += 1  # outside of it
    assert torch.equal(model(**inputs), changed)


def test_crop_offset_moves_the_window():
    model, inputs = tiny_mmdit("sd35-large"), random_inputs(height=8, width=12)
    middle = model(**inputs)
    assert torch.equal(model(**inputs, crop_offset=(4, 3)), middle)  # (12 - 4) // 2, (12 - 6) // 2
    assert not torch.allclose(model(**inputs, crop_offset=(0, 6)), middle)
    with pytest.raises(InputError, match=r"position crop \(0, 7\) leaves the table: at most \(8, 6\)"):
        model(**inputs, crop_offset=(0, 7))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents_BChw": torch.zeros(2, 16, 7, 8)}, "divisible by 16 pixels"),
        ({"latents_BChw": torch.zeros(2, 16, 26, 8)}, "13 x 4 patches is larger than .* table of 12 x 12"),
        ({"latents_BChw": torch.zeros(2, 4, 8, 8)}, "latents have 4 channels, the model takes 16"),
        ({"context_BLD": torch.zeros(2, 5, 64)}, "text is 64 wide, the model takes 96"),
        ({"pooled_BP": torch.zeros(2, 64)}, "pooled text is 64 wide, the model takes 40"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_mmdit("sd3-medium")(**(random_inputs() | change))
    assert "\n" not in str(caught.value)


def test_a_frozen_base_builds_no_graph():
    model = tiny_mmdit("sd35-medium")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(**random_inputs()).grad_fn is None


def test_timesteps_keep_float32_in_every_mode():
    timesteps = torch.tensor([900.0, 901.0], dtype=torch.float64)
    codes = sinusoid(timesteps)
    assert codes.dtype == torch.float32
    assert codes.shape == (2, 256)
    assert not torch.equal(codes[0], codes[1])  # equal in bf16, which has 4 between neighbours here
    assert torch.equal(sinusoid(torch.zeros(1))[0], torch.cat([torch.ones(128), torch.zeros(128)]))  # cosines first


def test_linears_are_named_by_native_paths():
    model = tiny_mmdit("sd35-medium")
    names = [name for name, _ in model.linears()]
    weights = [key.removesuffix(".weight") for key in model.state_dict() if key.endswith("weight") and "ln_" not in key]
    assert names == weights
    assert "joint_blocks.0.x_block.attn2.qkv" in names
    assert isinstance(dict(model.linears())["x_embedder.proj"], PatchProjection)


def test_patch_projection_is_the_strided_convolution():
    layer = PatchProjection(16, 12, 2)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    latents = torch.randn(2, 16, 6, 4)
    patches = torch.nn.functional.unfold(latents, 2, stride=2).transpose(1, 2)
    expected = torch.nn.functional.conv2d(latents, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(patches), expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert layer.dense_weight().shape == (12, 64)


def test_an_adapter_replaces_the_forward_and_stays_out_of_the_state():
    layer = Linear(4, 3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.zeros_(layer.bias)

    class Doubling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, linear):
            return 2 * linear.base(x)

    x = torch.randn(5, 4)
    plain = layer(x)
    layer.adapter = Doubling()
    assert torch.equal(layer(x), 2 * plain)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(layer.children()) == []
    layer.adapter = None
    assert torch.equal(layer(x), plain)
