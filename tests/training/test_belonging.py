"""What does not belong together is told once, in the user's words; where all fits, nothing is said."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_parts import TINY_VAE, random_tensors, save_single_file
from support.tiny_training import Inputs, fill_prompts, make_inputs, pictures

from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.sources import find_component

PROMPT = [{"width": 64, "height": 64, "steps": 1}]
ENOUGH = {"max_train_steps": 1, "sample_every_n_steps": None, "sample_every_n_epochs": None, "sample_at_first": False}


def save_vae(path, seed):
    """Writes a tiny VAE and returns its fingerprint."""
    save_single_file(path, {"vae": random_tensors(TINY_VAE.shapes(), torch.float32, seed)})
    return find_component("vae", model=path).fingerprint(FileStamps(path.with_suffix(".json")))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """Inputs that fit: the latents are of the VAE that lies in the model."""
    folder = tmp_path_factory.mktemp("belonging")
    own = save_vae(folder / "vae.safetensors", seed=1)
    made = make_inputs(folder, pictures(2), vae=own, **ENOUGH)
    save_file(load_file(made.model) | load_file(folder / "vae.safetensors"), made.model)
    return made


def told(caplog, inputs: Inputs, out: str, **options) -> list[str]:
    """The warnings of a run."""
    caplog.clear()
    inputs.train(out, **options)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.long
def test_nothing_is_said_where_all_fits(inputs, caplog):
    prompts = fill_prompts(inputs.folder / "prompts", PROMPT)
    for number, fitting in enumerate(({}, {"prompts": prompts}, {"vae": inputs.folder / "vae.safetensors"})):
        assert told(caplog, inputs, f"fits-{number}", **fitting) == []


def test_latents_of_another_vae_are_told_with_both_named(inputs, caplog):
    other = save_vae(inputs.folder / "other.safetensors", seed=2)
    own = find_component("vae", model=inputs.model).fingerprint(FileStamps(inputs.folder / "memory.json"))
    (line,) = told(caplog, inputs, "other-vae", vae=inputs.folder / "other.safetensors")
    assert f"{inputs.latents} was encoded with VAE {own[:12]}" in line
    assert f"other.safetensors holds VAE {other[:12]}" in line


def test_a_model_without_a_vae_has_none_to_compare_with(tmp_path, caplog):
    assert told(caplog, make_inputs(tmp_path, pictures(2), vae="of somewhere else", **ENOUGH), "bare") == []


@pytest.mark.long
def test_prompts_of_other_encoders_and_options_are_told_with_both_sides(inputs, caplog):
    encoder = fill_prompts(inputs.folder / "of-another-encoder", PROMPT, clip_l="k")
    (line,) = told(caplog, inputs, "encoder", prompts=encoder)
    assert f"{inputs.text} was encoded with CLIP-L l, and {encoder} with CLIP-L k: " in line
    length = fill_prompts(inputs.folder / "of-256", PROMPT, recipe={"tiny": 1, "t5xxl_max_token_length": 256})
    (line,) = told(caplog, inputs, "length", prompts=length)
    assert f"t5xxl_max_token_length unset, and {length} with t5xxl_max_token_length 256: " in line
    both = fill_prompts(inputs.folder / "of-both", PROMPT, recipe={"tiny": 2}, clip_l="k")
    assert len(told(caplog, inputs, "both", prompts=both)) == 2
