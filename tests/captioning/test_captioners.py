"""Captioners of several layouts through one code: words come out, batches or not, and repeat to the letter."""

import importlib.util
import json

import numpy as np
import pytest
from support import tiny_captioners

from sd3pipe.captioning.captioner import find_captioner
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.rules.captioning import GenerationRules

RULES = GenerationRules(captioner_dtype="float32", max_new_tokens=6)
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


def noise(number: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8) for seed in range(number)]


@pytest.mark.slow  # transformers is imported anew for each layout: 4 s
@pytest.mark.parametrize("layout", tiny_captioners.LAYOUTS)
def test_random_models_of_other_layouts_say_something_and_repeat_it(tmp_path, layout):
    import torch

    from sd3pipe.captioning.image_text import ImageTextModel

    captioner = find_captioner(str(tiny_captioners.LAYOUTS[layout](tmp_path / layout)))
    prompt = captioner.prompt(None)
    model = ImageTextModel(captioner, prompt, RULES, torch.device("cpu"), trust_code=False)
    pictures = noise(3)
    words = model.words(pictures)
    assert all(words)
    assert model.words(pictures) == words
    assert all(len(text.split()) <= RULES.max_new_tokens for text in words)  # what was asked is no part of the answer


@needs_onnx
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_tags_are_those_above_their_thresholds_characters_first(tmp_path, batch):
    from sd3pipe.captioning.tagger import Tagger

    captioner = find_captioner(str(tiny_captioners.tagger(tmp_path, batch=batch)))
    assert captioner.kind == "tagger"
    tagger = Tagger(captioner, GenerationRules(general_threshold=0.5, character_threshold=0.9), "cpu")
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0)}
    pictures = [np.full((9, 9, 3), colour, np.uint8) for colour in colours.values()]
    words = dict(zip(colours, tagger.words(pictures), strict=True))
    assert words == {
        "blue": "sea_spirit, blue_sky",
        "red": "hero, red_dress",
        "white": "hero, sea_spirit, blue_sky, green_field, red_dress",
        "black": "",
    }


@needs_onnx
def test_a_table_of_other_tags_is_refused(tmp_path):
    from sd3pipe.captioning.tagger import Tagger

    captioner = find_captioner(str(tiny_captioners.tagger(tmp_path)))
    (tmp_path / "selected_tags.csv").write_text("name,category\nred,0\n")
    with pytest.raises(InputError, match=r"6,\) outputs, the table 1 tags"):
        Tagger(captioner, RULES, "cpu").words(noise(1))
    (tmp_path / "selected_tags.csv").write_text("tag\nred\n")
    with pytest.raises(InputError, match="must have the columns name and category"):
        Tagger(captioner, RULES, "cpu")
    (tmp_path / "model.onnx").write_bytes(b"no network")
    (tmp_path / "selected_tags.csv").write_text("name,category\nred,0\n")
    with pytest.raises(InputError, match=r"model.onnx: cannot be read"):
        Tagger(captioner, RULES, "cpu")


@pytest.mark.parametrize(
    "files, problem",
    [
        ({}, "neither an image-text model"),
        ({"config.json": '{"model_type": "blip"}'}, "no .safetensors weights"),
        ({"config.json": "{}", "model.safetensors": ""}, "names no model_type"),
        ({"config.json": "[]", "model.safetensors": ""}, r"config.json"),
    ],
)
def test_what_is_no_captioner_is_named(tmp_path, files, problem):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=problem):
        find_captioner(str(tmp_path))
    with pytest.raises(InputError, match="there is no such folder"):
        find_captioner(str(tmp_path / "nowhere"))


def test_the_fingerprint_changes_with_every_file_that_matters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = set()
    for name in ("README.md", "config.json", "model.safetensors", "chat_template.jinja", "vocab.txt"):
        (tmp_path / name).write_text(name if name != "config.json" else '{"model_type": "git"}')
        captioner = find_captioner(str(tmp_path))
        seen.add(captioner.fingerprint(FileStamps(tmp_path / "stat.json", trust=False)))
    assert len(seen) == 5


def test_the_question_suits_the_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    asked = {}
    for model_type in ("blip", "florence2", "llava"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        asked[model_type] = find_captioner(str(tmp_path)).prompt(None)
        assert find_captioner(str(tmp_path)).prompt("tags?") == "tags?"
    assert asked["blip"] == "" and asked["florence2"] == "<MORE_DETAILED_CAPTION>" and "Describe" in asked["llava"]
