"""Real photographs and captions through all four commands on a tiny base in the genuine layout."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.command_line import forked, in_process, report_of, sd3pipe
from support.photographs import CAPTIONS, write_dataset_file, write_photographs
from support.tiny_base import TinyBase, write_tiny_base

from sd3pipe.models.checkpoint import load_mmdit

pytestmark = pytest.mark.long

STEPS = 6


@dataclass(frozen=True)
class Pipeline:
    folder: Path
    base: TinyBase
    dataset: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "photos"

    def model(self) -> list[object]:
        return ["--model", self.base.model]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    """Everything encoded, trained and exported; the pictures, encoders and VAE are gone before training."""
    folder = tmp_path_factory.mktemp("photographs")
    base = write_tiny_base(folder / "base", variant="sd35-medium", layout="diffusers")
    images = write_photographs(folder / "images")
    dataset = write_dataset_file(folder / "dataset.toml", images)
    made = Pipeline(folder=folder, base=base, dataset=dataset)
    caches = folder / "caches"
    in_process("encode-text", *made.model(), *base.encoder_options(), "--dataset", dataset, "--out", caches / "text")
    in_process("encode-latents", *made.model(), "--dataset", dataset, "--out", caches / "latents", "--threads", 1)
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(base.model / part)
    images.rename(folder / "images-gone")
    shutil.rmtree(base.tokenizers, ignore_errors=True)
    sd3pipe(
        "train", *made.model(), "--text", caches / "text", "--latents", caches / "latents", "--out", made.run,
        "--network-dim", 4, "--network-alpha", 2, "--learning-rate", 0.02, "--max-train-steps", STEPS,
        "--save-every-n-steps", 3, "--lr-scheduler", "constant", "--lr-warmup-steps", 0,
        "--gradient-accumulation-steps", 2, "--loras-dir", folder / "loras", "--output-name", "photos", "--threads", 1,
    )  # fmt: skip
    for name in ("comfyui", "diffusers"):
        in_process("export", "--adapter", made.run, "--format", name, "--out", folder / f"{name}.safetensors")
    return made


def test_every_photograph_and_caption_is_a_row(pipeline):
    text, latents = (report_of(pipeline.folder / "caches" / name) for name in ("text", "latents"))
    assert (text["encoded"], text["reused"], text["failed"]) == (len(CAPTIONS) + 1, 0, 0)  # the empty caption is one
    assert (latents["encoded"], latents["quarantined"]) == (len(CAPTIONS), 0)
    assert text["stage"] == "encode-text" and latents["stage"] == "encode-latents"


def test_train_reports_what_it_did(pipeline):
    report = json.loads((pipeline.run / "report.json").read_text())
    assert (report["stage"], report["steps"], report["exit_code"]) == ("train", STEPS, 0)
    assert {"seconds_per_step", "loss_first", "loss_last", "peak_rss_bytes", "peak_device_bytes", "inputs"} <= set(
        report
    )
    assert len((pipeline.run / "metrics.jsonl").read_text().splitlines()) >= STEPS


def test_run_folder_holds_what_the_design_says(pipeline):
    for step in (3, 6):
        names = {path.name for path in (pipeline.run / "checkpoints" / f"step-{step:08d}").iterdir()}
        assert {"adapter.safetensors", "optimizer.safetensors", "state.json"} <= names
    assert {path.name for path in (pipeline.run / "final").iterdir()} == {"adapter.safetensors", "inputs.json"}


def test_saved_adapters_land_in_the_loras_folder(pipeline):
    names = sorted(path.name for path in (pipeline.folder / "loras").iterdir())
    assert names == ["photos-step00000003.safetensors", "photos.safetensors"] or names == [
        "photos-step00000003.safetensors", "photos-step00000006.safetensors", "photos.safetensors",
    ]  # fmt: skip


def test_comfyui_file_has_native_keys_with_alpha(pipeline):
    with safe_open(pipeline.folder / "comfyui.safetensors", "pt") as file:
        keys = set(file.keys())
        alpha = file.get_tensor("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha")
        metadata = file.metadata()
    assert all(key.startswith("lora_unet_") for key in keys)
    assert alpha.item() == 2
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"


def test_exported_file_predicts_in_diffusers_as_here(pipeline):
    """Error under 1e-4 between diffusers with the exported file and this MMDiT with the adapter's delta added."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    ours = load_mmdit(pipeline.base.model)
    architecture = ours.architecture
    inputs = {
        "hidden_states": torch.randn(2, architecture.in_channels, 16, 12),
        "timestep": torch.tensor([250.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 20, architecture.context_width),
        "pooled_projections": torch.randn(2, architecture.pooled_width),
    }
    arguments = tuple(inputs.values())
    with torch.no_grad():
        base = ours(*arguments)
        add_adapter(ours, load_file(pipeline.folder / "comfyui.safetensors"))
        expected = ours(*arguments)
        theirs = SD3Transformer2DModel.from_pretrained(pipeline.base.model / "transformer")
        theirs.load_lora_adapter(
            load_file(pipeline.folder / "diffusers.safetensors"), prefix="transformer", adapter_name="photos"
        )
        predicted = theirs(**inputs).sample
    assert (predicted - expected).norm() / expected.norm() < 1e-4
    assert (predicted - base).norm() / base.norm() > 1e-2


def add_adapter(mmdit, tensors: dict[str, torch.Tensor]) -> None:
    """Adds up x down x alpha / rank to each weight: kohya's rule, stated without the package's adapters."""
    for name, linear in mmdit.linears():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.alpha" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"].float(), tensors[f"{key}.lora_up.weight"].float()
            delta = up.flatten(1) @ down.flatten(1) * (tensors[f"{key}.alpha"].item() / down.shape[0])
            linear.weight.data += delta.view_as(linear.weight)


def test_second_train_of_the_same_run_does_nothing(pipeline):
    before = (pipeline.run / "final" / "adapter.safetensors").read_bytes()
    caches = pipeline.folder / "caches"
    done = forked(
        "train", *pipeline.model(), "--text", caches / "text", "--latents", caches / "latents", "--out", pipeline.run,
        "--network-dim", 4, "--network-alpha", 2, "--learning-rate", 0.02, "--max-train-steps", STEPS,
        "--save-every-n-steps", 3, "--lr-scheduler", "constant", "--lr-warmup-steps", 0,
        "--gradient-accumulation-steps", 2, "--threads", 1,
    )  # fmt: skip
    assert "nothing to do" in done.stdout
    assert (pipeline.run / "final" / "adapter.safetensors").read_bytes() == before


def test_second_export_of_the_same_adapter_does_nothing(pipeline):
    arguments = (
        "export",
        "--adapter",
        pipeline.run,
        "--format",
        "comfyui",
        "--out",
        pipeline.folder / "comfyui.safetensors",
    )
    first = report_of(pipeline.folder / "comfyui.safetensors")
    assert "nothing to do" in forked(*arguments).stdout
    again = report_of(pipeline.folder / "comfyui.safetensors")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert "nothing to do" not in forked(*arguments, "--dtype", "fp32").stdout
