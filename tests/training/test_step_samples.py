"""Samples during training: pictures per step, grids over the steps, nothing random left behind, nothing drawn twice."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.diffusion.kept_latents import keep_latents, read_latents, read_parameters
from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, render_grid, save_picture
from sd3pipe.diffusion.prompts import SamplePrompt
from sd3pipe.diffusion.sampler import SamplingSettings, TextCondition
from sd3pipe.errors import InputError
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.training.run_folder import RunFolder
from sd3pipe.training.step_samples import StepSamples

DEFAULTS = SamplingSettings(steps=2, scale=2.0)


@pytest.fixture(scope="module")
def prompts():
    inputs = random_inputs(batch=2)
    texts = [
        TextCondition(context=context[None], pooled=pooled[None])
        for context, pooled in zip(inputs["context_BLD"], inputs["pooled_BP"], strict=True)
    ]
    return [
        SamplePrompt(
            name=f"{number:03d}", prompt=f"prompt {number}", text=texts[number], negative=texts[1 - number],
            key="", negative_key="", width=32, height=48,
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEArchitecture(level_widths=(32, 32, 32, 32), blocks_per_level=1)).eval()


def samples(run, prompts, vae):
    mmdit = tiny_mmdit("sd35-medium").train()
    return StepSamples(
        RunFolder(run),
        prompts,
        mmdit=mmdit,
        vae=vae,
        defaults=DEFAULTS,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip


def test_every_step_gets_its_pictures_and_the_grid_grows(tmp_path, prompts, vae):
    drawing = samples(tmp_path, prompts, vae)
    first = drawing.draw(0)
    narrow = Image.open(tmp_path / "samples/000.png").width
    drawing.draw(250)
    assert [file.relative_to(tmp_path).as_posix() for file in first] == [
        "samples/step-00000000/000.png",
        "samples/step-00000000/001.png",
    ]
    assert Image.open(first[0]).size == (32, 48)
    assert Image.open(tmp_path / "samples/000.png").width > narrow


def test_a_picture_depends_on_its_prompt_and_the_weights_alone(tmp_path, prompts, vae):
    drawing = samples(tmp_path, prompts, vae)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [read_picture_file(file) for file in drawing.draw(0)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = [read_picture_file(file) for file in drawing.draw(1)]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[0] != first[1]).any()
    assert drawing.mmdit.training


def test_a_prompt_larger_than_the_position_table_is_named(prompts):
    architecture = tiny_mmdit("sd35-medium").architecture
    most = architecture.pos_embed_max * 16
    assert replace(prompts[0], width=most).size(architecture) == (48, most)
    with pytest.raises(InputError, match=f"sample prompt 001: {most + 16} x 48 pixels: .* at most {most}"):
        replace(prompts[1], width=most + 16).size(architecture)


def test_pictures_that_exist_are_not_drawn_again(tmp_path, prompts, vae):
    files = samples(tmp_path, prompts, vae).draw(0)
    stamps = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in samples(tmp_path, prompts, vae).draw(0)] == stamps


def test_pictures_say_what_they_were_drawn_with_as_the_web_reads_it(tmp_path, prompts, vae):
    prompts = [replace(prompts[0], prompt="a cat, sitting", negative_prompt="blurry", seed=7, scale=1.5), prompts[1]]
    first, second = (Image.open(file).info["parameters"] for file in samples(tmp_path, prompts, vae).draw(250))
    assert first.split("\n") == [
        "a cat, sitting",
        "Negative prompt: blurry",
        "Steps: 2, Sampler: Euler, CFG scale: 1.5, Seed: 7, Size: 32x48, Shift: 3, Training step: 250",
    ]
    assert second.startswith("prompt 1\nSteps: 2, ")
    assert b"tEXtparameters\0a cat" in (tmp_path / "samples/step-00000250/000.png").read_bytes()


def test_latents_are_kept_without_a_vae(tmp_path, prompts):
    files = samples(tmp_path, prompts, None).draw(0)
    assert read_parameters(files[0]).endswith("Training step: 0")
    assert [file.name for file in files] == ["000.safetensors", "001.safetensors"]
    assert read_latents(files[0], 16).shape == (1, 16, 6, 4)


def test_a_file_without_latents_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no latents"):
        read_latents(tmp_path / "x.safetensors", 16)


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 8, 8, 16), (1, 16, 0, 8), (2, 16, 8, 8), (1, 16, 8, 8, 1)])
def test_latents_of_another_form_are_named(tmp_path, shape):
    keep_latents(tmp_path / "x.safetensors", torch.zeros(shape), prompt="", parameters="")
    with pytest.raises(InputError, match="no latents of this VAE"):
        read_latents(tmp_path / "x.safetensors", 16)


def test_grid_has_a_cell_for_every_picture_and_room_for_long_titles():
    picture = torch.randint(0, 255, (64, 96, 3), dtype=torch.uint8).numpy()
    pictures = [[picture, None], [picture, picture]]
    grid = Grid(
        title="many words " * 30, columns=["base", "step 250 x 0.8"], rows=["seed 1", "seed 2"], pictures=pictures
    )
    short = Grid(title="few words", columns=grid.columns, rows=grid.rows, pictures=pictures)
    image = render_grid(grid)
    assert image.height > render_grid(short).height
    assert image.width >= 2 * 96 * 2  # tiny pictures are enlarged


def test_pictures_come_back_as_they_were_saved(tmp_path):
    picture = torch.randint(0, 255, (8, 16, 3), dtype=torch.uint8).numpy()
    save_picture(tmp_path / "a.png", picture, title="ein Bär 🐻")
    assert (read_picture_file(tmp_path / "a.png") == picture).all()
    assert Image.open(tmp_path / "a.png").info["Description"] == "ein Bär 🐻"
