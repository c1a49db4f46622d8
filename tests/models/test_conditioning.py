"""Context and pooled vector from rows."""

import pytest
import torch

from sd3pipe.models.conditioning import assemble_conditioning


def row(seed, t5_length=5, t5_width=10):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"clip_l": (4, 3), "clip_g": (4, 5), "t5xxl": (t5_length, t5_width), "pooled_l": (3,), "pooled_g": (5,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_clips_stand_side_by_side_and_t5_follows():
    one = row(0)
    context_BLD, pooled_BP = assemble_conditioning([one])
    assert context_BLD.shape == (1, 9, 10)
    assert torch.equal(context_BLD[0, :4, :3], one["clip_l"].float())
    assert torch.equal(context_BLD[0, :4, 3:8], one["clip_g"].float())
    assert not context_BLD[0, :4, 8:].any()
    assert torch.equal(context_BLD[0, 4:], one["t5xxl"].float())
    assert torch.equal(pooled_BP[0], torch.cat([one["pooled_l"], one["pooled_g"]]).float())


def test_shorter_rows_are_filled_with_zeros():
    long, short = row(0, t5_length=7), row(1, t5_length=2)
    context_BLD, _ = assemble_conditioning([long, short])
    assert context_BLD.shape == (2, 11, 10)
    assert torch.equal(context_BLD[1, 4:6], short["t5xxl"].float())
    assert not context_BLD[1, 6:].any()


def test_a_dropped_encoder_is_zero_in_context_and_pooled():
    rows = [row(0), row(1), row(2), row(3)]
    keep_BE = torch.tensor([[True, True, True], [False, True, True], [True, False, True], [True, True, False]])
    context_BLD, pooled_BP = assemble_conditioning(rows, keep_BE=keep_BE)
    whole_BLD, whole_BP = assemble_conditioning(rows)
    parts = {0: (slice(0, 4), slice(0, 3)), 1: (slice(0, 4), slice(3, 8)), 2: (slice(4, 9), slice(0, 10))}
    expected_BLD, expected_BP = whole_BLD.clone(), whole_BP.clone()
    for number, (tokens, channels) in parts.items():
        expected_BLD[number + 1, tokens, channels] = 0
    expected_BP[1, :3] = 0
    expected_BP[2, 3:] = 0
    assert torch.equal(context_BLD, expected_BLD)
    assert torch.equal(pooled_BP, expected_BP)


def test_dtype_is_the_wanted_one():
    context_BLD, pooled_BP = assemble_conditioning([row(0)], dtype=torch.bfloat16)
    assert context_BLD.dtype == pooled_BP.dtype == torch.bfloat16


def test_wrong_axes_are_refused():
    with pytest.raises(ValueError, match="keep_BE"):
        assemble_conditioning([row(0)], keep_BE=torch.ones(2, 3))
    with pytest.raises(ValueError, match="more than T5's"):
        assemble_conditioning([row(0, t5_width=7)])
