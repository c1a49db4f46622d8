"""Training, `sample` and `judge` draw no picture twice; what a run draws is what its files draw, to the bit."""

import shutil

import pytest
import torch
from support.tiny_parts import TINY_VAE, random_tensors, save_single_file
from support.tiny_training import Inputs, fill_prompts, make_inputs, pictures

from sd3pipe.commands import sample
from sd3pipe.params.sample import SampleParams
from sd3pipe.tensors.reader import read_file
from sd3pipe.training.step_samples import SamplePrompt

SETTINGS = [{"width": 64, "height": 64, "steps": 2, "seed": seed} for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """Alpha over rank is no power of two, so that a scale that was rounded elsewhere would show."""
    folder = tmp_path_factory.mktemp("shared")
    save_single_file(folder / "vae.safetensors", {"vae": random_tensors(TINY_VAE.shapes(), torch.float32, 1)})
    return make_inputs(
        folder, pictures(3), max_train_steps=4, save_every_n_steps=2, sample_every_n_steps=2, network_dim=3,
        network_alpha=1.0, learning_rate=0.05,
    )  # fmt: skip


def run_with(inputs: Inputs, folder, **options):
    """Returns a run that draws its samples, and the cache of their prompts, beside which nothing is drawn yet."""
    prompts = fill_prompts(folder / "prompts", SETTINGS)
    return inputs.train(folder / "r", prompts=prompts, vae=inputs.folder / "vae.safetensors", **options), prompts


def draw(inputs: Inputs, run, prompts, out):
    params = SampleParams(
        model=str(inputs.model), vae=inputs.folder / "vae.safetensors", prompts=prompts, adapter=run.folder,
        checkpoints="all", threads=1, out=out,
    )  # fmt: skip
    sample.main(params)
    return {file.name: read_file(file)["latents"] for file in (out / "latents").iterdir()}


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"network_dropout": 0.1},
        *(pytest.param({"adapter_type": kind}, marks=pytest.mark.slow) for kind in ("dora", "loha", "lokr")),
        {"ema_decay": 0.5},
    ],
    ids=["lora", "dora", "loha", "lokr", "ema"],
)
def test_sample_finds_what_training_drew_and_would_draw_the_same_bits(inputs, tmp_path, monkeypatch, options):
    run, prompts = run_with(inputs, tmp_path, **options)
    alone = shutil.copytree(prompts, tmp_path / "alone" / "prompts")
    drawn = draw(inputs, run, alone, tmp_path / "drawn")
    monkeypatch.setattr(sample, "draw_cells", lambda *_, **__: pytest.fail("nothing is missing"))
    found = draw(inputs, run, prompts, tmp_path / "found")
    assert len(found) == 3 * len(SETTINGS) and found.keys() == drawn.keys()
    assert all(torch.equal(found[name], drawn[name]) for name in found)


@pytest.mark.long
def test_training_draws_no_base_that_is_there(inputs, tmp_path, monkeypatch):
    run, prompts = run_with(inputs, tmp_path)
    seen = []
    draws = SamplePrompt.drawn
    monkeypatch.setattr(SamplePrompt, "drawn", lambda self, *a, **k: seen.append(self.name) or draws(self, *a, **k))
    vae = inputs.folder / "vae.safetensors"
    again = inputs.train(tmp_path / "again", prompts=prompts, vae=vae, max_train_steps=2)
    assert seen == ["000", "001", "002"]  # at step 2
    first = "samples/step-00000000/000.png"
    assert (again.folder / first).read_bytes() == (run.folder / first).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("options", [{"base_dtype": "int8"}, {"save_precision": "fp16"}, {"full_bf16": True}])
def test_what_other_weights_drew_is_not_shared(inputs, tmp_path, options):
    _, prompts = run_with(inputs, tmp_path, **options)
    assert not (prompts.parent / ".sd3pipe" / "pictures").exists()


@pytest.mark.long
def test_a_run_draws_as_many_of_the_prompts_as_it_is_told(inputs, tmp_path):
    run, _ = run_with(inputs, tmp_path, max_sample_prompts=2)
    assert sorted(file.name for file in (run.folder / "samples/step-00000004").iterdir()) == ["000.png", "001.png"]
