"""Bad input ends in one clear line and the documented exit code, without a traceback."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import forked, in_process
from support.photographs import write_dataset_file, write_photographs
from support.tiny_base import TinyBase, write_tiny_base

from sd3pipe import cli
from sd3pipe.commands import encode_latents, encode_text

TWO = ("chelsea.png", "coffee.png")
TEXT_ENCODER_FILES = {"--clip-l": "clip_l", "--clip-g": "clip_g", "--t5xxl": "t5xxl_fp16"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_dataset_file(folder / "dataset.toml", write_photographs(folder / "images", TWO, 96), resolution=64)


def one_error(*arguments: object, expect: int) -> str:
    """Runs a command that must fail with one line on stderr, and returns that line."""
    done = forked(*arguments, expect=expect)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def text_words(base: TinyBase, dataset: Path, out: Path, *, leave_out: tuple[str, ...] = ()) -> list[object]:
    options = base.encoder_options()
    for option in leave_out:
        at = options.index(option)
        del options[at : at + 2]
    return ["encode-text", "--model", base.model, *options, "--dataset", dataset, "--out", out]


def latents_words(model: Path, dataset: Path, out: Path, *more: object) -> list[object]:
    options = ["--dataset", dataset, "--out", out, "--max-data-loader-n-workers", 0]
    return ["encode-latents", "--model", model, *options, *more]


def test_t5_that_is_nowhere_is_asked_for(base, dataset, tmp_path):
    line = one_error(*text_words(base, dataset, tmp_path / "text", leave_out=("--t5xxl",)), expect=3)
    assert "--t5xxl" in line


def test_no_tokenizers_names_the_way_to_them(base, dataset, tmp_path):
    for file in base.folder.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)  # apart from the tokenizers, which are found beside a model
    files = {name: tmp_path / f"{file}.safetensors" for name, file in TEXT_ENCODER_FILES.items()}
    options = [word for name, file in files.items() for word in (name, file)]
    line = one_error(
        "encode-text", "--model", tmp_path / base.model.name, *options, "--dataset", dataset,
        "--out", tmp_path / "text", expect=3,
    )  # fmt: skip
    assert "sd3pipe tokenizers" in line


def test_ckpt_is_refused_with_the_reason(dataset, tmp_path):
    model = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, model)
    line = one_error(*latents_words(model, dataset, tmp_path / "latents"), expect=3)
    assert "model.ckpt" in line and "run code" in line


def test_file_cut_short_is_named(base, dataset, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.model.read_bytes()[:-1000])
    assert "cut.safetensors" in one_error(*latents_words(cut, dataset, tmp_path / "latents"), expect=3)


def test_lora_given_as_model_is_told(dataset, tmp_path):
    lora = tmp_path / "lora.safetensors"
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 128), f"{name}.lora_up.weight": torch.zeros(384, 4)}, lora)
    assert "LoRA" in one_error(*latents_words(lora, dataset, tmp_path / "latents"), expect=3)


def test_sdxl_checkpoint_is_told(dataset, tmp_path):
    sdxl = tmp_path / "sdxl.safetensors"
    names = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.1.model.ln_final.weight",
        "first_stage_model.encoder.conv_in.weight",
    )
    save_file({name: torch.zeros(4, 4) for name in names}, sdxl)
    assert "SDXL" in one_error(*latents_words(sdxl, dataset, tmp_path / "latents"), expect=3)


def test_missing_model_file_is_named(dataset, tmp_path):
    line = one_error(*latents_words(tmp_path / "nowhere.safetensors", dataset, tmp_path / "latents"), expect=3)
    assert "nowhere.safetensors" in line


@pytest.mark.parametrize("stage", [encode_text, encode_latents])
def test_files_of_the_model_are_missed_before_pictures_are_read(base, dataset, tmp_path, monkeypatch, capsys, stage):
    monkeypatch.delattr(stage, "read_dataset")
    words = [stage.__name__.rpartition(".")[2].replace("_", "-"), "--model", tmp_path / "no.safetensors"]
    assert cli.run([*map(str, words), f"--dataset={dataset}", f"--out={tmp_path / 'out'}"]) == 3
    assert "no.safetensors: no such file" in capsys.readouterr().err


def test_caption_that_is_not_utf8_is_named(base, tmp_path):
    images = write_photographs(tmp_path / "images", TWO, 64)
    (images / "coffee.txt").write_bytes("Caf\xe9".encode("latin-1"))
    dataset = write_dataset_file(tmp_path / "dataset.toml", images, resolution=64)
    assert "coffee.txt" in one_error(*text_words(base, dataset, tmp_path / "text"), expect=3)


def test_empty_dataset_is_told(base, tmp_path):
    (tmp_path / "images").mkdir()
    dataset = write_dataset_file(tmp_path / "dataset.toml", tmp_path / "images", resolution=64)
    assert "images" in one_error(*latents_words(base.model, dataset, tmp_path / "latents"), expect=3)


def test_output_that_cannot_be_written_is_told(base, dataset, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert "file" in one_error(*latents_words(base.model, dataset, blocked / "latents"), expect=7)


def test_every_wrong_key_of_a_stage_file_is_named(base, dataset, tmp_path):
    config = tmp_path / "encode_latents.toml"
    config.write_text('vae_batch_sise = 2\nlatent_mode = "median"\n')
    done = forked(*latents_words(base.model, dataset, tmp_path / "latents", "--config", config), expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "did you mean vae_batch_size?" in done.stderr and "latent_mode" in done.stderr


def test_unknown_option_is_one_line(dataset):
    assert "--modle" in one_error("encode-latents", "--modle", "x", "--dataset", dataset, expect=2)


class TestResumeOnOtherCaches:
    """A run resumed by path on caches that were made with another VAE or another T5 stops, and shows what differs."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory, base, dataset) -> Path:
        folder = tmp_path_factory.mktemp("resume")
        in_process(*text_words(base, dataset, folder / "text"))
        in_process(*latents_words(base.model, dataset, folder / "latents"))
        in_process(*cls.train(base, folder, "text", "latents"))
        other = write_tiny_base(folder / "other", variant="sd35-medium", layout="separate", seed=1)
        in_process(*latents_words(other.model, dataset, folder / "latents-of-other-vae"))
        options = base.encoder_options()
        options[options.index("--t5xxl") + 1] = str(other.t5xxl)
        in_process(
            "encode-text", "--model", base.model, *options, "--dataset", dataset, "--out", folder / "text-of-other-t5"
        )
        return folder

    @staticmethod
    def train(base: TinyBase, folder: Path, text: str, latents: str, *more: object) -> list[object]:
        return [
            "train", "--model", base.model, "--text", folder / text, "--latents", folder / latents,
            "--out", folder / "run", "--network-dim", 2, "--max-train-steps", 2, "--save-every-n-steps", 1,
            "--threads", 1, *more,
        ]  # fmt: skip

    @pytest.mark.parametrize(("text", "latents"), [("text", "latents-of-other-vae"), ("text-of-other-t5", "latents")])
    def test_resume_by_path_refuses(self, base, folder, text, latents):
        checkpoint = folder / "run" / "checkpoints" / "step-00000001"
        done = forked(*self.train(base, folder, text, latents, "--resume", checkpoint), expect=4)
        assert "Traceback" not in done.stderr
        assert text in done.stderr or latents in done.stderr or "rows" in done.stderr

    @pytest.mark.long
    def test_resume_auto_sets_the_old_run_aside(self, base, folder):
        copy = folder / "copy"
        shutil.copytree(folder / "run", copy / "run")
        for name in ("text", "latents-of-other-vae"):
            shutil.copytree(folder / name, copy / name)
        forked(*self.train(base, copy, "text", "latents-of-other-vae"))
        assert (copy / "run.1" / "final" / "adapter.safetensors").is_file()
        assert (copy / "run" / "final" / "adapter.safetensors").is_file()
