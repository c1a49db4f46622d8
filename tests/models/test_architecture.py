"""The architecture is told from shapes alone, and has the real models' numbers."""

import json
import math
import subprocess
import sys

import pytest
from support.public_models import PUBLIC_ARCHITECTURES

from sd3pipe.errors import InputError
from sd3pipe.models.architecture import MMDiTArchitecture, detect_mmdit

# model-spec 1.1: parameters with the position table, tensors, one block, the last block
REAL = {
    "sd3-medium": (PUBLIC_ARCHITECTURES["sd3-medium"], 2_084_951_104, 491, 84_980_736, 54_294_528),
    "sd35-medium": (PUBLIC_ARCHITECTURES["sd35-medium"], 2_469_663_936, 665, 101_506_944, 54_294_784),
    "sd35-large": (PUBLIC_ARCHITECTURES["sd35-large"], 8_146_280_768, 923, 212_999_680, 136_085_248),
}
FOLDERS = {
    "sd3-medium": "stable-diffusion-3-medium",
    "sd35-medium": "stable-diffusion-3.5-medium",
    "sd35-large": "stable-diffusion-3.5-large",
}


def _count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("variant", REAL)
def test_real_sizes_have_the_published_counts(variant):
    architecture, parameters, tensors, first_block, last_block = REAL[variant]
    shapes = architecture.shapes()
    assert architecture.variant == variant
    assert (_count(shapes), len(shapes)) == (parameters, tensors)
    assert _count(architecture.block_shapes(0)) == first_block
    assert _count(architecture.block_shapes(architecture.depth - 1)) == last_block


@pytest.mark.parametrize("variant", REAL)
def test_real_configurations_give_the_architecture(variant, shared_dir):
    file = shared_dir / "model-configs" / FOLDERS[variant] / "transformer" / "config.json"
    config = json.loads(file.read_text())
    told = MMDiTArchitecture(
        depth=config["num_layers"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        pos_embed_max=config["pos_embed_max_size"],
        pooled_width=config["pooled_projection_dim"],
        context_width=config["joint_attention_dim"],
        qk_norm=config.get("qk_norm") is not None,
        dual_attention_blocks=tuple(config.get("dual_attention_layers", ())),
    )
    assert told == REAL[variant][0]
    assert told.width == config["caption_projection_dim"]
    assert detect_mmdit(told.shapes()) == told


@pytest.mark.parametrize("variant", REAL)
def test_detection_does_not_depend_on_the_order_of_keys(variant):
    architecture = REAL[variant][0]
    assert detect_mmdit(dict(sorted(architecture.shapes().items()))) == architecture


def _tiny_shapes():
    return MMDiTArchitecture(depth=2, pos_embed_max=8, qk_norm=True, pooled_width=32, context_width=48).shapes()


def test_a_missing_tensor_is_named():
    shapes = _tiny_shapes()
    del shapes["joint_blocks.1.x_block.mlp.fc2.bias"]
    with pytest.raises(InputError, match=r"lacks joint_blocks\.1\.x_block\.mlp\.fc2\.bias: the file is incomplete"):
        detect_mmdit(shapes)


def test_a_missing_block_is_told_from_the_width():
    shapes = {key: shape for key, shape in _tiny_shapes().items() if not key.startswith("joint_blocks.1.")}
    with pytest.raises(InputError, match="128 wide and has 1 joint blocks"):
        detect_mmdit(shapes)


def test_a_foreign_tensor_is_not_ignored():
    with pytest.raises(InputError, match=r"not understood: joint_blocks\.0\.x_block\.attn\.qkv\.scale_weight"):
        detect_mmdit(_tiny_shapes() | {"joint_blocks.0.x_block.attn.qkv.scale_weight": ()})


def test_a_wrong_shape_is_named_with_the_right_one():
    with pytest.raises(InputError, match=r"final_layer.linear.bias is \[3\] and should be \[64\]"):
        detect_mmdit(_tiny_shapes() | {"final_layer.linear.bias": (3,)})


def test_another_kind_of_model_is_refused():
    with pytest.raises(InputError, match=r"no SD3 MMDiT here: x_embedder\.proj\.weight is missing"):
        detect_mmdit({"input_blocks.0.0.weight": (320, 4, 3, 3)})


def test_architecture_is_told_without_torch():
    code = "import sys, sd3pipe.models.architecture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
