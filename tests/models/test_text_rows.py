"""Rows of the three text encoders on a tiny base with random weights."""

import errno
import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.text_encoding import encode, equal_bits
from support.tiny_base import write_tiny_base

from sd3pipe.errors import InputError, ParameterError, StorageError
from sd3pipe.models import text_rows
from sd3pipe.models.text_encoders import T5Encoder
from sd3pipe.models.text_recipe import RECIPE_VERSION, TextRecipe

TEXTS = ["", "a photo of a cat", "a dog on a table, " * 3, "red circle!", "a", "a blue square on white", "trees"]
SHORT = {"t5xxl_max_token_length": 32, "t5_pad_to": 32, "text_dtype": "float32"}


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    return encode(base, TEXTS, tmp_path_factory.mktemp("scratch"))


def test_rows_have_the_widths_of_their_encoders(rows):
    shapes = {name: tuple(tensor.shape) for name, tensor in rows[0].items()}
    assert shapes == {
        "clip_l": (77, 64),
        "pooled_l": (64,),
        "mask_l": (77,),
        "clip_g": (77, 128),
        "pooled_g": (128,),
        "mask_g": (77,),
        "t5xxl": (32, 256),
        "mask_t5": (32,),
    }
    assert {name: tensor.dtype for name, tensor in rows[0].items() if "mask" in name} == {
        "mask_l": torch.uint8,
        "mask_g": torch.uint8,
        "mask_t5": torch.uint8,
    }


def test_masks_count_the_tokens(rows):
    empty, cat = rows[0], rows[1]
    assert [int(empty[f"mask_{name}"].sum()) for name in ("l", "g", "t5")] == [2, 2, 1]
    assert int(cat["mask_l"].sum()) == int(cat["mask_g"].sum()) > 2
    assert cat["mask_t5"].tolist() == sorted(cat["mask_t5"].tolist(), reverse=True)


def test_distinct_texts_give_distinct_rows(rows):
    for name in ("clip_l", "clip_g", "t5xxl", "pooled_l", "pooled_g"):
        assert len({tuple(row[name].flatten().tolist()) for row in rows}) == len(TEXTS), name


def test_a_row_does_not_depend_on_its_neighbours(base, rows, tmp_path):
    shuffled = [TEXTS[5], TEXTS[2], TEXTS[0], TEXTS[6]]
    again = encode(base, shuffled, tmp_path)
    assert all(equal_bits(row, rows[TEXTS.index(text)]) for text, row in zip(shuffled, again, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_streamed_t5_gives_the_same_bits(base, tmp_path, masked):
    recipe = TextRecipe(**SHORT, apply_t5_attn_mask=masked)
    resident = encode(base, TEXTS, tmp_path, recipe)
    streamed = encode(base, TEXTS, tmp_path, recipe, stream_t5=True)
    assert all(map(equal_bits, resident, streamed))


def test_neighbours_without_padding_change_no_masked_row(base, tmp_path):
    recipe = TextRecipe(**SHORT, apply_lg_attn_mask=True, apply_t5_attn_mask=True)
    full = "cat " * 100
    alone = encode(base, ["a cat", "a dog", "a tree"], tmp_path, recipe)
    beside = encode(base, ["a cat", full, full], tmp_path, recipe)
    assert equal_bits(alone[0], beside[0])
    all_full = encode(base, [full, full, full], tmp_path, recipe)
    assert equal_bits(all_full[0], beside[1])


def test_masks_inside_the_encoders_change_what_they_should(base, rows, tmp_path):
    """CLIP is causal, so its mask changes padding positions alone; T5 looks both ways."""
    masked = encode(base, TEXTS, tmp_path, TextRecipe(**SHORT, apply_lg_attn_mask=True, apply_t5_attn_mask=True))
    row, plain = masked[1], rows[1]
    tokens = int(row["mask_l"].sum())
    torch.testing.assert_close(row["clip_l"][:tokens], plain["clip_l"][:tokens], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(row["clip_l"][tokens:], plain["clip_l"][tokens:], atol=1e-2)
    torch.testing.assert_close(row["pooled_g"], plain["pooled_g"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(row["t5xxl"][:2], plain["t5xxl"][:2], atol=1e-2)


def test_a_masked_t5_row_does_not_depend_on_the_padded_length(base, tmp_path):
    def states(length):
        recipe = TextRecipe(t5xxl_max_token_length=32, t5_pad_to=length, text_dtype="float32", apply_t5_attn_mask=True)
        return encode(base, ["a cat"], tmp_path, recipe)[0]["t5xxl"][:3]

    torch.testing.assert_close(states(16), states(32), rtol=1e-4, atol=1e-5)


def test_zeroed_padding_leaves_the_tokens_alone(base, rows, tmp_path):
    zeroed = encode(base, TEXTS, tmp_path, TextRecipe(**SHORT, padding="zero"))
    for row, plain in zip(zeroed, rows, strict=True):
        for name, mask in (("clip_l", "mask_l"), ("clip_g", "mask_g"), ("t5xxl", "mask_t5")):
            kept = row[mask].bool()
            assert torch.equal(row[name][kept], plain[name][kept])
            assert not row[name][~kept].any()
        assert torch.equal(row["pooled_l"], plain["pooled_l"])


def test_t5_pad_to_pads_short_texts_and_keeps_longer_ones(base, tmp_path):
    recipe = TextRecipe(t5xxl_max_token_length=24, t5_pad_to=8, text_dtype="float32")
    rows = encode(base, ["", "a cat on a table and a dog", "cat " * 100, "a"], tmp_path, recipe)
    lengths = [len(row["t5xxl"]) for row in rows]
    assert lengths[0] == lengths[3] == 8
    assert 8 < lengths[1] < 24
    assert lengths[2] == 24
    assert all(int(row["mask_t5"].sum()) == length for row, length in zip(rows[1:3], lengths[1:3], strict=True))
    alone = encode(base, ["a"], tmp_path, recipe)
    assert equal_bits(alone[0], rows[3])


LENGTHS = [
    " ".join(["cat"] * count) for count in (1, 9, 30, 12, 2, 14, 40, 3, 9, 11, 1, 30)
]  # padded, own and cut ones


@pytest.mark.parametrize("stream_t5", [False, True])
def test_texts_of_many_lengths_pass_t5_hardly_more_than_once(base, tmp_path, monkeypatch, stream_t5):
    recipe = TextRecipe(t5xxl_max_token_length=16, t5_pad_to=8, text_dtype="float32")
    passed = []
    encode_batches = T5Encoder.encode

    def counted(self, batches, **options):
        passed.extend(len(batch.ids) for batch in batches)
        return encode_batches(self, batches, **options)

    monkeypatch.setattr(T5Encoder, "encode", counted)
    monkeypatch.setattr(text_rows, "_WINDOW_BYTES", 64 << 10)  # several windows
    rows = encode(base, LENGTHS, tmp_path, recipe, stream_t5=stream_t5)
    assert sum(passed) <= len(LENGTHS) + 2 * 2  # batches of 3 are filled up for what is padded and for what is cut
    alone = {text: encode(base, [text], tmp_path, recipe)[0] for text in set(LENGTHS)}
    assert all(equal_bits(row, alone[text]) for text, row in zip(LENGTHS, rows, strict=True))


def test_pad_to_beyond_the_maximum_is_refused():
    with pytest.raises(ParameterError, match="--t5-pad-to 64"):
        TextRecipe(t5xxl_max_token_length=32, t5_pad_to=64)


def test_no_texts_give_no_rows(base, tmp_path):
    assert encode(base, [], tmp_path) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rows_are_near_those_in_float32(base, rows, tmp_path, dtype):
    half = encode(base, TEXTS, tmp_path, TextRecipe(**{**SHORT, "text_dtype": dtype}))
    assert half[1]["t5xxl"].dtype == getattr(torch, dtype)
    for name in ("clip_l", "clip_g", "t5xxl", "pooled_g"):
        difference = (half[1][name].float() - rows[1][name]).norm() / rows[1][name].norm()
        assert 0 < difference < (3e-2 if dtype == "bfloat16" else 5e-3), name


def test_a_full_disk_is_a_storage_error(base, tmp_path, monkeypatch):
    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError, match="disk is full"):
        encode(base, ["a"], tmp_path)


def with_t5(base, folder, tensors):
    """Returns the base with another T5 file."""
    path = folder / "t5.safetensors"
    save_file(tensors, path)
    return type(base)(**{name: getattr(base, name) for name in base.__slots__} | {"t5xxl": path})


@pytest.mark.long
@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled"])
def test_fp8_t5_equals_its_dequantised_weights(base, tmp_path, storage):
    eight = write_tiny_base(tmp_path / "fp8", layout="separate", t5_storage=storage)
    stored = load_file(eight.t5xxl)
    scales = {key.removesuffix("scale_weight"): value for key, value in stored.items() if key.endswith("scale_weight")}
    assert bool(scales) == (storage == "fp8_scaled")
    plain = {
        key: value.float() * scales.get(key.removesuffix("weight"), 1.0)
        for key, value in stored.items()
        if not key.endswith("scale_weight") and key != "scaled_fp8"
    }
    expected = encode(with_t5(base, tmp_path, plain), TEXTS[:2], tmp_path)
    assert all(map(equal_bits, encode(eight, TEXTS[:2], tmp_path), expected))
    sixteen = encode(base, TEXTS[:2], tmp_path)
    assert not torch.allclose(sixteen[1]["t5xxl"], expected[1]["t5xxl"], atol=1e-3)


@pytest.mark.long
def test_all_layouts_give_the_same_bits(base, rows, tmp_path):
    for layout in ("single", "diffusers"):
        other = write_tiny_base(tmp_path / layout, layout=layout)
        assert all(map(equal_bits, encode(other, TEXTS, tmp_path), rows)), layout


@pytest.mark.parametrize("projection", [torch.eye(64), torch.full((64, 64), 0.5)], ids=["identity", "of a whole CLIP"])
def test_a_projection_of_clip_l_changes_nothing(base, rows, tmp_path, projection):
    tensors = load_file(base.clip_l)
    assert "text_projection.weight" not in tensors
    path = tmp_path / "clip_l.safetensors"
    save_file({**tensors, "text_projection.weight": projection.half()}, path)
    explicit = type(base)(**{name: getattr(base, name) for name in base.__slots__} | {"clip_l": path})
    assert equal_bits(encode(explicit, TEXTS[:3], tmp_path)[1], rows[1])


def test_an_incomplete_encoder_is_an_input_error(base, tmp_path):
    tensors = load_file(base.t5xxl)
    del tensors["encoder.block.1.layer.1.layer_norm.weight"]
    with pytest.raises(InputError, match=r"lacks encoder\.block\.1\.layer\.1\.layer_norm\.weight"):
        encode(with_t5(base, tmp_path, tensors), ["a"], tmp_path)


def test_numbers_that_are_not_finite_are_an_input_error(base, tmp_path):
    tensors = load_file(base.t5xxl)
    tensors["encoder.final_layer_norm.weight"][3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        encode(with_t5(base, tmp_path, tensors), ["a"], tmp_path)


def test_another_models_tokenizer_is_an_input_error(base, tmp_path, shared_dir):
    other = type(base)(
        **{name: getattr(base, name) for name in base.__slots__} | {"tokenizers": shared_dir / "tokenizers"}
    )
    with pytest.raises(InputError, match="do not belong together"):
        encode(other, ["a"], tmp_path)


# Recipe version -> a few numbers of the row of TEXTS[1]. A change that moves them raises RECIPE_VERSION, so that older
# rows are not taken for rows of the present code.
GOLDEN = {
    1: {
        "clip_l": [1.0485, -1.2648, -2.3294, 0.5801, 0.6561],
        "clip_g": [1.4911, 2.1717, -1.9105, 0.8957, -1.1093],
        "t5xxl": [2.1603, 2.8575, 0.4893, -1.0117, 0.1973],
        "pooled_l": [-1.2553, 2.1116, -1.5271, 1.407, -0.7587],
        "pooled_g": [-0.5681, 0.5339, 0.4031, 0.2515, 2.5688],
    },
}


def test_rows_are_those_of_their_recipe_version(rows):
    found = {name: samples(rows[1][name]) for name in GOLDEN[RECIPE_VERSION]}
    expected = {name: pytest.approx(values, rel=2e-3, abs=2e-3) for name, values in GOLDEN[RECIPE_VERSION].items()}
    assert found == expected  # rounding between machines is 1e-5; whatever moves a row on purpose moves it more


def samples(tensor: torch.Tensor) -> list[float]:
    flat = tensor.flatten()
    return [round(float(value), 4) for value in flat[:: max(1, len(flat) // 5)][:5]]
