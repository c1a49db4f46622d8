"""The base in the package: its size and layout, and that it draws what held-out prompts say."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.demo_pictures import accuracy, draw_latents, encode_subjects, held_out_subjects, read_latents

from sd3pipe.demo.base_files import FOLDER, MODEL, TOKENIZERS
from sd3pipe.demo.drawings import NEW_WORD, Subject
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.models.vae_architecture import detect_vae

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"shape": 0.9, "colour": 0.9, "size": 0.9, "background": 0.9}


def test_base_is_at_most_20_megabytes_in_half_precision():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 20e6
    for component in ("mmdit", "vae", *ENCODERS):
        source = find_component(component, model=MODEL)
        assert {entry.dtype for entry in source.tensors.values()} == {"F16"}


def test_base_is_a_whole_sd35_medium():
    architecture = detect_mmdit(find_component("mmdit", model=MODEL).shapes())
    assert architecture.variant == "sd35-medium"
    assert detect_vae(find_component("vae", model=MODEL).shapes(), "base").latent_channels == 16
    assert set(find_tokenizers(folder=TOKENIZERS, model=None, files=[])) == set(ENCODERS)


def test_model_card_states_measured_accuracy():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = {name: float(share) for name, share in re.findall(r"\| (\w+) \| ([\d.]+) % \|", card)}
    assert stated.keys() == set(LEAST)
    assert all(stated[field] >= 100 * least for field, least in LEAST.items())


@pytest.mark.long
def test_a_few_prompts_are_drawn_right(tmp_path):
    subjects = held_out_subjects()[:12]
    found = accuracy(subjects, read_latents(draw_latents(encode_subjects(tmp_path / "a", subjects, 1))))
    assert min(found.values()) >= 0.75  # of twelve; the whole measurement is in the slow tier


@pytest.mark.slow
def test_held_out_prompts_are_drawn_right(base_accuracy):
    assert len(held_out_subjects()) == 200
    assert all(base_accuracy[field] >= least for field, least in LEAST.items()), base_accuracy


@pytest.mark.slow
def test_padding_as_other_programs_pad_does_little_harm(tmp_path):
    subjects = held_out_subjects()[:50]
    prompts = encode_subjects(tmp_path / "a", subjects, 1000, t5xxl_max_token_length=256)
    found = accuracy(subjects, read_latents(draw_latents(prompts)))
    assert min(found.values()) >= 0.65, found


@pytest.mark.long
def test_base_does_not_know_the_new_shape(tmp_path):
    colours = np.random.default_rng(1).permutation(["red", "blue", "green", "yellow", "purple", "orange"])
    subjects = [Subject(shape=NEW_WORD, colour=str(c), size="large", background="white") for c in colours]
    readings = read_latents(draw_latents(encode_subjects(tmp_path / "a", subjects, 5)))
    assert sum(reading.shape == NEW_WORD for reading in readings) <= 1
