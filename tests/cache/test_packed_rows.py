"""States that are kept as int8 with scales: half of their bytes, and near to what they were."""

import pytest
import torch

from sd3pipe.cache.rows import layout_bytes, layout_of
from sd3pipe.cache.tensors import row_from_torch, row_to_torch, to_torch
from sd3pipe.models.text_encoder_files import TextSizes

TOKENS = 16


def states(width):
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(1)).bfloat16()


def packed(states_LD):
    return row_from_torch({"t5xxl": states_LD, "mask_t5": torch.ones(TOKENS, dtype=torch.uint8)}, packed=["t5xxl"])


def errors_D(states_LD):
    """Returns each column's error, relative to its own size."""
    there_and_back = row_to_torch(packed(states_LD))["t5xxl"]
    return (there_and_back - states_LD.float()).norm(dim=0) / states_LD.float().norm(dim=0)


@pytest.mark.parametrize("width", [4096, 96, 7])  # 96 and 7 are not whole groups of 64
def test_packed_states_are_near_the_dense_ones(width):
    assert 1e-3 < errors_D(states(width)).mean() < 0.01  # a normal group's step is 2.4 / 127 of its deviation


def test_large_numbers_coarsen_their_own_group_alone():
    plain, with_large = states(4096), states(4096)
    with_large[:, 70] *= 50  # two groups of 64 in: as a few channels of large encoders are
    others = [column for column in range(4096) if not 64 <= column < 128]
    assert torch.equal(errors_D(with_large)[others], errors_D(plain)[others])


def test_zeros_stay_zeros_and_extremes_stay_finite():
    states_LD = torch.zeros(TOKENS, 128)
    states_LD[0, 0], states_LD[1, 64], states_LD[2, 5] = 3e38, -1e-30, 1e-45
    there_and_back = row_to_torch(packed(states_LD))["t5xxl"]
    assert torch.isfinite(there_and_back).all()
    assert not there_and_back[3:].any()
    torch.testing.assert_close(there_and_back[:2], states_LD[:2], rtol=0.005, atol=0.0)


def test_a_row_comes_back_under_its_own_names():
    row = packed(states(128))
    assert {name: tensor.dtype for name, tensor in row.items()} == {
        "t5xxl": "I8", "t5xxl_scale": "BF16", "mask_t5": "U8",
    }  # fmt: skip
    back = row_to_torch(row)
    assert set(back) == {"t5xxl", "mask_t5"}
    by_hand = to_torch(row["t5xxl"]).float() * to_torch(row["t5xxl_scale"]).float().repeat_interleave(64, dim=1)
    assert torch.equal(back["t5xxl"], by_hand)


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("width", [4096, 96])
def test_the_foretold_bytes_are_those_of_a_row(format, width):
    sizes = TextSizes(widths={"clip_l": 24, "clip_g": 40, "t5xxl": width})
    clips = {"clip_l": torch.zeros(77, 24), "clip_g": torch.zeros(77, 40)}
    pooled = {"pooled_l": torch.zeros(24), "pooled_g": torch.zeros(40)}
    row = {name: values.bfloat16() for name, values in (clips | pooled | {"t5xxl": torch.zeros(TOKENS, width)}).items()}
    masks = {"mask_l": 77, "mask_g": 77, "mask_t5": TOKENS}
    row |= {name: torch.zeros(length, dtype=torch.uint8) for name, length in masks.items()}
    stored = row_from_torch(row, packed=["t5xxl"] if format else [])
    assert sizes.row_bytes(TOKENS, "bfloat16", packed=format) == layout_bytes(layout_of(stored))
