"""`sd3pipe demo` as a user runs it: a smoke in a minute, and in the slow tier what it is there to show."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.command_line import forked, sd3pipe
from support.demo_pictures import FIELDS, accuracy, draw_latents, encode_subjects, held_out_subjects, read_latents

from sd3pipe.demo.base_files import MODEL, TOKENIZERS
from sd3pipe.demo.drawings import NEW_WORD
from sd3pipe.demo.project import RUN
from sd3pipe.judgement import read_judgement
from sd3pipe.models.vae import to_model_space

PICTURE = "before-and-after.png"


@pytest.mark.long
def test_demo_runs_all_stages_and_leaves_a_lora_and_a_picture(tmp_path):
    folder = tmp_path / "demo"
    sd3pipe("demo", folder, "--steps", 2, "--seeds", 1)
    report = json.loads((folder / "demo.report.json").read_text(encoding="utf-8"))
    assert report["new_pictures"] == report["old_pictures"] == 4
    assert len(load_file(folder / f"exports/{NEW_WORD}.safetensors")) > 0
    assert Image.open(folder / PICTURE).width > 64
    buckets = json.loads((folder / "caches/latents.report.json").read_text(encoding="utf-8"))["buckets"]
    assert len(buckets) >= 3
    judgement = read_judgement(folder / RUN / "judge")
    assert [scores.checkpoint for scores in judgement.scores] == [1, 2] and judgement.trigger == NEW_WORD


@pytest.mark.long
def test_demo_does_not_overwrite_what_is_not_its_own(tmp_path):
    (tmp_path / "project.toml").write_text("[paths]\n", encoding="utf-8")
    done = forked("demo", tmp_path, expect=2)
    assert "is not the demo's" in done.stderr


@pytest.mark.slow
def test_new_shape_is_drawn_after_and_not_before(shown, wanted, tmp_path):
    prompts = encode_subjects(tmp_path / "a", wanted, 500)
    after = accuracy(wanted, read_latents(draw_latents(prompts, shown / f"exports/{NEW_WORD}.safetensors")))
    before = accuracy(wanted, read_latents(draw_latents(prompts)))
    assert len(wanted) == 32
    assert after["shape"] >= 0.8, after
    assert before["shape"] <= 0.05, before


@pytest.mark.slow
def test_old_prompts_stay_near_the_base(shown, base_accuracy, tmp_path):
    subjects = held_out_subjects()
    prompts = encode_subjects(tmp_path / "a", subjects, 1000)
    after = accuracy(subjects, read_latents(draw_latents(prompts, shown / f"exports/{NEW_WORD}.safetensors")))
    assert all(after[field] >= base_accuracy[field] - 0.05 for field in FIELDS), (base_accuracy, after)


def train(shown: Path, caches: Path, out: Path, *options: object) -> None:
    """Trains on the demo's caches, which may lie elsewhere."""
    arguments = ("--model", MODEL, "--text", caches / "text", "--latents", caches / "latents", "--out", out)
    sd3pipe("train", *arguments, "--config", shown / "stages/train.toml", *options)


@pytest.mark.slow
def test_moved_caches_and_streamed_blocks_train_the_same_adapter(shown, tmp_path):
    caches = shutil.copytree(shown / "caches", tmp_path / "moved")
    train(shown, caches, tmp_path / "r", "--stale-ok", "--blocks-to-swap", 2)
    first, second = (load_file(run / "final/adapter.safetensors") for run in (shown / RUN, tmp_path / "r"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_memory_modes_learn_the_new_shape_as_well(shown, wanted, tmp_path):
    layer_major = ("--layer-major", "--train-batch-size", 4, "--gradient-accumulation-steps", 2)
    train(shown, shown / "caches", tmp_path / "r", "--base-dtype", "int8", *layer_major)
    prompts = encode_subjects(tmp_path / "a", wanted, 500)
    after = accuracy(wanted, read_latents(draw_latents(prompts, tmp_path / "r/final/adapter.safetensors")))
    assert after["shape"] >= 0.8, after


@pytest.mark.slow
def test_exported_file_draws_the_same_in_diffusers(shown, wanted, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from support.demo_as_diffusers import write_demo_base_for_diffusers

    write_demo_base_for_diffusers(tmp_path / "base", TOKENIZERS)
    sd3pipe("export", "--adapter", shown / RUN, "--format", "diffusers", "--out", tmp_path / "lora.safetensors")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base")
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipeline.set_progress_bar_config(disable=True)
    prompts = encode_subjects(tmp_path / "a", wanted[:8], 500)
    ours = to_model_space(draw_latents(prompts, shown / RUN / "final/adapter.safetensors"))
    theirs = torch.cat(
        [
            pipeline(
                prompt_embeds=prompt.text.context,
                pooled_prompt_embeds=prompt.text.pooled,
                negative_prompt_embeds=prompt.negative.context,
                negative_pooled_prompt_embeds=prompt.negative.pooled,
                latents=prompt.noise(pipeline_architecture()),
                height=64, width=64, num_inference_steps=prompt.steps, guidance_scale=prompt.scale,
                output_type="latent",
            ).images
            for prompt in prompts
        ]
    )  # fmt: skip
    # the export is in half precision, and 28 steps carry its rounding on
    assert ((ours - theirs).norm() / ours.norm()).item() < 0.02


def pipeline_architecture():
    from sd3pipe.models.architecture import mmdit_architecture
    from sd3pipe.models.sources import find_component

    return mmdit_architecture(find_component("mmdit", model=MODEL))
