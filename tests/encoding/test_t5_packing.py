"""T5 with packed matrices: near the dense one, the same bits streamed or not, and other keys."""

import pytest
import torch
from support.text_encoding import encode, equal_bits
from torch import nn

from sd3pipe.encoding.t5_memory import PackedLinear, streams_t5, t5_packer
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.text_rows import compute_dtype

TEXTS = ["", "a photo of a cat", "red circle!"]
SHORT = {"t5xxl_max_token_length": 16, "t5_pad_to": 16, "text_dtype": "float32"}
# relative error of the last states: 2 to 3 bits of mantissa, 7 bits, 4 bits; through every block of the tiny T5
ERRORS = {"fp8": (5e-3, 0.1), "int8": (1e-3, 0.04), "nf4": (2e-2, 0.3)}


@pytest.mark.parametrize("format", ERRORS)
def test_packed_t5_is_near_the_dense_one_and_clip_is_untouched(base, tmp_path, format):
    dense = encode(base, TEXTS, tmp_path, TextRecipe(**SHORT))
    recipe = TextRecipe(**SHORT, t5xxl_base_dtype=format)
    packed = encode(base, TEXTS, tmp_path, recipe, pack_t5=t5_packer(format))
    for row, other in zip(packed, dense, strict=True):
        error = (row["t5xxl"] - other["t5xxl"]).norm() / other["t5xxl"].norm()
        assert ERRORS[format][0] < error < ERRORS[format][1]
        assert torch.equal(row["clip_l"], other["clip_l"])
    streamed = encode(base, TEXTS, tmp_path, recipe, stream_t5=True, pack_t5=t5_packer(format))
    assert all(map(equal_bits, streamed, packed))


def test_every_matrix_of_a_block_is_packed_and_nothing_else():
    block = nn.ModuleDict({"q": nn.Linear(64, 128, bias=False), "norm": nn.LayerNorm(64), "bias": nn.Embedding(8, 4)})
    weight = block["q"].weight.detach().clone()
    t5_packer("int8")(block)
    assert isinstance(block["q"], PackedLinear)
    assert block["q"].nbytes == 64 * 128 + 128 * 4
    assert isinstance(block["bias"], nn.Embedding)
    torch.testing.assert_close(block["q"](torch.eye(64)).T, weight, rtol=0.0, atol=weight.abs().max().item() / 100)


def test_a_packed_t5_has_a_recipe_of_its_own():
    fields = [TextRecipe(t5xxl_base_dtype=format).fields() for format in (None, *ERRORS)]
    assert "t5xxl_base_dtype" not in fields[0]  # rows that were encoded without it keep their keys
    assert len({str(sorted(values.items())) for values in fields}) == 4


def test_a_packed_t5_needs_less_room(base, monkeypatch):
    source = find_component("t5xxl", model=base.model, file=base.t5xxl)
    weights = sum(torch.Size(shape).numel() for shape in source.shapes().values())
    free = int(1.15 * 2 * weights) + (2 << 30) - 1
    monkeypatch.setattr("sd3pipe.encoding.t5_memory.available_memory", lambda: free)
    assert streams_t5("auto", source, torch.bfloat16, torch.device("cpu"))
    assert not streams_t5("auto", source, torch.bfloat16, torch.device("cpu"), "int8")


def test_cards_without_bfloat16_compute_in_float32_and_t5_never_in_float16(monkeypatch):
    cuda = torch.device("cuda", 0)
    for native in (True, False):
        monkeypatch.setattr("sd3pipe.models.text_rows.has_bfloat16", lambda native=native: native)
        assert compute_dtype("t5xxl", "float16", cuda) == torch.float32
        assert compute_dtype("clip_g", "float16", cuda) == torch.float16
        wide = torch.bfloat16 if native else torch.float32
        assert compute_dtype("t5xxl", "bfloat16", cuda) == compute_dtype("clip_l", "bfloat16", cuda) == wide
    assert compute_dtype("t5xxl", "bfloat16", torch.device("cpu")) == torch.bfloat16
