"""What changes a text row's key, and what does not. Nothing is encoded here."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_base import write_tiny_base

from sd3pipe.cache.keys import text_source
from sd3pipe.data.prompts import WrittenPrompt
from sd3pipe.encoding import text_encoding, text_plan
from sd3pipe.encoding.text_plan import prompt_texts, text_wanted
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.text_encoder_files import TextSizes, find_text_encoders
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.params.encode_text import EncodeTextParams

RECIPE = TextRecipe()


def key_of(base, tmp_path, *, text="a cat", recipe=RECIPE, model=None, tokenizers=None, **files):
    """Returns the key of one text."""
    paths = {name: getattr(base, name) for name in ("clip_l", "clip_g", "t5xxl")} | files
    encoders = find_text_encoders(str(model or base.model), paths, tokenizers or base.tokenizers)
    fingerprints = encoders.fingerprints(FileStamps(tmp_path / "memory.json"))
    texts = prompt_texts([WrittenPrompt(prompt=text)])
    wanted = text_wanted(texts, encoders.sizes, fingerprints, recipe)
    return dict(zip(texts.text_by_hash, wanted.keys, strict=True))[text_source(text)]


@pytest.mark.parametrize(
    "change",
    [
        {"padding": "zero"},
        {"apply_lg_attn_mask": True},
        {"apply_t5_attn_mask": True},
        {"t5xxl_max_token_length": 300},
        {"t5_pad_to": 77},
        {"text_dtype": "float32"},
        {"t5xxl_base_dtype": "int8"},
        {"t5xxl_row_dtype": "int8"},
    ],
)
def test_each_recipe_field_changes_the_key(base, tmp_path, change):
    assert key_of(base, tmp_path, recipe=replace(RECIPE, **change)) != key_of(base, tmp_path)


def test_every_recipe_field_is_in_the_key():
    packings = {"t5xxl_base_dtype": "int8", "t5xxl_row_dtype": "int8"}
    everything = replace(RECIPE, **packings).fields()
    assert set(everything) == set(TextRecipe.__dataclass_fields__)
    # rows that were encoded without a packing keep their keys
    assert RECIPE.fields() == {name: value for name, value in everything.items() if name not in packings}


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g", "t5xxl"])
def test_one_bit_of_any_encoder_changes_the_key(base, tmp_path, encoder):
    tensors = load_file(getattr(base, encoder))
    name = "encoder.final_layer_norm.weight" if encoder == "t5xxl" else "text_model.final_layer_norm.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0] = tensors[name][0].nextafter(tensors[name][0] + 1)
    save_file(tensors, tmp_path / "other.safetensors")
    assert key_of(base, tmp_path, **{encoder: tmp_path / "other.safetensors"}) != key_of(base, tmp_path)


def test_the_recipe_version_changes_the_key(base, tmp_path, monkeypatch):
    before = key_of(base, tmp_path)
    monkeypatch.setattr(text_plan, "RECIPE_VERSION", text_plan.RECIPE_VERSION + 1)
    assert key_of(base, tmp_path) != before


@pytest.mark.parametrize(
    ("text", "same"),
    [("a  cat", False), ("A cat", False), ("a cat ", False), ("\ufeffa cat", True)],
)
def test_the_text_is_the_source(base, tmp_path, text, same):
    assert (key_of(base, tmp_path, text=text) == key_of(base, tmp_path)) == same


def test_line_ends_do_not_matter(base, tmp_path):
    keys = {key_of(base, tmp_path, text=text) for text in ("a\nb", "a\r\nb", "a\rb")}
    assert len(keys) == 1


def test_a_changed_tokenizer_changes_the_key(base, tmp_path):
    shutil.copytree(base.tokenizers, tmp_path / "t")
    merges = tmp_path / "t" / "clip_l" / "merges.txt"
    lines = merges.read_text(encoding="utf-8").split("\n")
    merges.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    assert key_of(base, tmp_path, tokenizers=tmp_path / "t") != key_of(base, tmp_path)


def test_where_things_lie_does_not_matter(base, tmp_path):
    """Not the layout of the checkpoint, nor the file names, nor the tokenizers' file format."""
    single = write_tiny_base(tmp_path / "single", layout="single")
    moved = tmp_path / "moved"
    for name in ("clip_l", "t5xxl"):
        shutil.copytree(base.tokenizers / name, moved / name)
    (moved / "t5xxl" / "spiece.model").unlink()
    keys = {
        key_of(base, tmp_path),
        key_of(base, tmp_path, model=single.model, clip_l=None, clip_g=None, t5xxl=None),
        key_of(base, tmp_path, tokenizers=moved),
    }
    assert len(keys) == 1


def test_settings_of_a_prompt_are_in_no_key(base, tmp_path):
    plain = prompt_texts([WrittenPrompt(prompt="a cat")])
    adorned = prompt_texts([WrittenPrompt(prompt="a cat", width=64, height=64, sample_steps=3, scale=2.0, seed=5)])
    assert plain.text_by_hash == adorned.text_by_hash
    assert plain.samples["key"] == adorned.samples["key"]
    assert plain.samples["settings"] != adorned.samples["settings"]


def test_rows_cost_what_the_plan_says():
    """2.4 MB a caption at the genuine widths with padding kept, as bfloat16."""
    wanted = text_wanted(prompt_texts([WrittenPrompt(prompt="a")]), TextSizes(), {}, RECIPE)
    assert {row.nbytes for row in wanted.rows} == {2 * (78 * 2048 + 256 * 4096) + 2 * 77 + 256}


def test_a_forecast_counts_each_texts_own_tokens_and_rows_that_fill_up(base, monkeypatch):
    monkeypatch.setattr(text_encoding, "_products_per_second", lambda *_: 1.0)
    files = {name: getattr(base, name) for name in ("clip_l", "clip_g", "t5xxl")}
    encoders = find_text_encoders(str(base.model), files, base.tokenizers)
    params = EncodeTextParams(dataset="dataset.toml", device="cpu", text_encoder_batch_size=4)
    recipe = TextRecipe(t5_pad_to=8)

    def seconds(*texts: str) -> float:
        tokens, _ = text_encoding.tokenized(texts, encoders, recipe)
        return text_encoding.seconds_to_encode(tokens, encoders, recipe, params)[1]

    assert seconds("a") == seconds("a", "b", "c", "d") < seconds("a", "b", "c", "d", "e")
    assert seconds("a") < seconds("cat " * 50) < seconds("cat " * 100)


def test_encoders_of_different_models_are_an_input_error(base, tmp_path):
    with pytest.raises(InputError, match="not the encoders of one model"):
        find_text_encoders(
            str(base.model),
            {"clip_l": base.clip_g, "clip_g": wide_clip(base, tmp_path), "t5xxl": base.t5xxl},
            base.tokenizers,
        )


def wide_clip(base, folder):
    """Returns a CLIP whose width, with another CLIP's, is more than T5's."""
    architecture = replace(base.architecture.clip_g, width=192, projected_width=192)
    tensors = {key: torch.zeros(shape) for key, shape in architecture.shapes().items()}
    save_file(tensors, folder / "wide.safetensors")
    return folder / "wide.safetensors"
