"""Position windows, and the scaled tables of sd-scripts against diffusers' sines."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.errors import InputError
from sd3pipe.models.pos_embed import ScaledPositions, crop_positions, crop_range, scaled_table


def test_the_window_lies_in_the_middle():
    table = torch.arange(36.0)[:, None]
    assert crop_positions(table, 2, 4).flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    assert crop_range(6, 2, 4) == (4, 2)


def test_a_scaled_table_spans_0_to_16_in_its_middle():
    side, width = 8, 32
    table = scaled_table(side, width)
    # The same codes from the oracle: a grid of 12 whose coordinates are i * 16 / 8, shifted by the margin of 2.
    grid = np.meshgrid(*(2 * [16 * (np.arange(12, dtype=np.float64) - 2) / 8]))
    oracle = _codes_at(grid, width)
    np.testing.assert_allclose(table.numpy(), oracle, atol=1e-6)  # float32 of sines up to 1


def test_plain_codes_are_those_of_diffusers():
    grid = np.meshgrid(*(2 * [np.arange(6, dtype=np.float64)]))
    expected = get_2d_sincos_pos_embed(32, 6, base_size=6, output_type="pt").numpy()
    np.testing.assert_allclose(_codes_at(grid, 32), expected, atol=1e-6)


def _codes_at(grid, width):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

    return get_2d_sincos_pos_embed_from_grid(width, torch.tensor(np.stack(grid)), output_type="pt").numpy()


def test_a_picture_takes_the_table_nearest_in_area():
    positions = ScaledPositions([(512, 512), (1024, 1024)], width=32)
    assert positions.sides == [32, 64]
    assert positions.table(32, 32).shape[0] == 48**2
    assert positions.table(46, 48).shape[0] == 48**2  # 2208 patches; the limit lies at (32^2 + 64^2) / 2 = 2560
    assert positions.table(52, 50).shape[0] == 96**2  # 2600 patches
    assert positions.table(64, 64).shape[0] == 96**2


def test_a_picture_taller_than_its_table_gets_one_of_its_own():
    positions = ScaledPositions([(256, 256)], width=32)
    assert positions.table(30, 4).shape[0] == 45**2  # 30 > 24 = 1.5 x 16
    assert positions.table(40, 40).shape[0] == 60**2  # above the last limit


def test_scaled_positions_need_a_resolution():
    with pytest.raises(InputError, match="at least one resolution"):
        ScaledPositions([(8, 8)], width=32)


def test_the_model_uses_scaled_positions_where_set():
    model, inputs = tiny_mmdit("sd35-medium"), random_inputs()
    before = model(**inputs)
    model.scaled_positions = ScaledPositions([(64, 64)], width=model.architecture.width)
    scaled = model(**inputs)
    assert not torch.allclose(before, scaled)
    model.scaled_positions = None
    assert torch.equal(model(**inputs), before)
