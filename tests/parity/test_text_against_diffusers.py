"""Text conditioning against StableDiffusion3Pipeline.encode_prompt: same tiny weights, the real tokenizers."""

import pytest
import torch
from support.text_encoding import encode
from support.tiny_base import write_tiny_base

from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.text_recipe import TextRecipe

PROMPTS = [
    "",
    "a photo of a cat sitting on a wooden table, film grain",
    "Ein Café in Zürich; 3 people (very happy:1.2), 漢字, it's “quoted” — and\nanother line",
    "tag, " * 60 + "a very long caption that every encoder has to cut",
    "a dog",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, shared_dir):
    folder = tmp_path_factory.mktemp("tiny-real-tokenizers")
    return write_tiny_base(folder, layout="diffusers", tokenizers=shared_dir / "tokenizers", seed=1)


@pytest.fixture(scope="module")
def pipeline(base):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(base.model, torch_dtype=torch.float32)


@pytest.mark.long
@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("stream_t5", [False, True])
def test_rows_equal_encode_prompt(base, pipeline, tmp_path, length, stream_t5):
    recipe = TextRecipe(text_dtype="float32", t5xxl_max_token_length=length, t5_pad_to=length)
    rows = encode(base, PROMPTS, tmp_path, recipe, stream_t5=stream_t5)
    context_BLD, pooled_BP = assemble_conditioning(rows)
    expected_BLD, _, expected_BP, _ = pipeline.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=length
    )
    # float32 rounding alone: the same layers in the same order, batched otherwise
    torch.testing.assert_close(context_BLD, expected_BLD, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(pooled_BP, expected_BP, rtol=1e-5, atol=2e-5)
