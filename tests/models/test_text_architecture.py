"""Architectures from shapes, at the genuine sizes without any memory."""

import json
import math

import pytest

from sd3pipe.errors import InputError
from sd3pipe.models.text_architecture import ClipArchitecture, T5Architecture, detect_clip, detect_t5

CLIP_L = ClipArchitecture(width=768, depth=12, mlp_width=3072, vocabulary=49408, positions=77, projected_width=None)
CLIP_G = ClipArchitecture(width=1280, depth=32, mlp_width=5120, vocabulary=49408, positions=77, projected_width=1280)
T5_XXL = T5Architecture(width=4096, depth=24, heads=64, mlp_width=10240, vocabulary=32128, distance_buckets=32)


@pytest.mark.parametrize(
    ("architecture", "parameters", "tensors"),
    [(CLIP_L, 123_060_480, 196), (CLIP_G, 694_659_840, 517), (T5_XXL, 4_762_310_656, 219)],
)
def test_genuine_sizes(architecture, parameters, tensors):
    shapes = architecture.shapes()
    assert sum(map(math.prod, shapes.values())) == parameters
    assert len(shapes) == tensors


def test_shapes_tell_the_architecture():
    assert detect_clip(CLIP_L.shapes(), "x") == CLIP_L
    assert detect_clip(CLIP_G.shapes(), "x") == CLIP_G
    assert detect_t5(T5_XXL.shapes(), "x") == T5_XXL
    assert (CLIP_L.heads, CLIP_G.heads, CLIP_L.pooled_width) == (12, 20, 768)


@pytest.mark.parametrize("model", ["stable-diffusion-3-medium", "stable-diffusion-3.5-large"])
def test_keys_and_shapes_are_those_of_transformers(shared_dir, model):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def shapes_of(kind, config_kind, part):
        config = json.loads((shared_dir / "model-configs" / model / part / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            module = kind(config_kind(**config))
        return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}

    clip_l = shapes_of(CLIPTextModelWithProjection, CLIPTextConfig, "text_encoder")
    assert clip_l == {**CLIP_L.shapes(), "text_projection.weight": (768, 768)}
    assert shapes_of(CLIPTextModelWithProjection, CLIPTextConfig, "text_encoder_2") == CLIP_G.shapes()
    t5xxl = shapes_of(T5EncoderModel, T5Config, "text_encoder_3")
    assert t5xxl.pop("encoder.embed_tokens.weight") == (32128, 4096)
    assert t5xxl == T5_XXL.shapes()


@pytest.mark.parametrize("detect", [detect_clip, detect_t5])
@pytest.mark.parametrize("change", ["missing", "excess", "other", "flat"])
def test_what_does_not_fit_is_named(detect, change):
    shapes = (CLIP_L if detect is detect_clip else T5_XXL).shapes()
    key = next(reversed(shapes))
    first = next(iter(shapes))
    if change == "missing":
        del shapes[key]
    elif change == "excess":
        shapes[key := "lm_head.weight"] = (3, 3)
    elif change == "other":
        shapes[key] = (5,)
    else:
        shapes[key := first] = (49408,)
    with pytest.raises(InputError, match=r"^x: ") as caught:
        detect(shapes, "x")
    assert key in str(caught.value)
