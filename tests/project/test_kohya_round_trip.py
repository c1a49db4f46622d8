"""Commands in five styles are one project, which is encoded, trained and exported; its report says what they said."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command_line import forked, sd3pipe

from sd3pipe.demo.base_files import MODEL

TOKENIZERS = MODEL.parent / "tokenizers"

# what the run's identity says where a command says nothing of it
UNSAID: dict[str, Any] = {
    "loss_form": "x0", "weighting_scheme": "uniform", "training_shift": 1.0, "loss_type": "l2", "learning_rate": 1e-4,
    "lr_scheduler": "constant", "optimizer_type": "AdamW", "network_dim": 2, "network_alpha": 1.0,
}  # fmt: skip

# what a command says beside its places -> what the run's identity says of it, the seed aside
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "documented": (
        {"network_alpha": 1, "weighting_scheme": "sigma_sqrt", "lr_scheduler": "constant", "seed": 7},
        {"weighting_scheme": "sigma_sqrt"},
    ),
    "unet-lr": (
        {"unet_lr": 5e-5, "seed": 1234, "min_timestep": 100, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"learning_rate": 5e-5, "min_timestep": 100, "lr_scheduler": "cosine"},
    ),
    "logit-normal": (
        {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "training_shift": 3.0, "seed": 1},
        {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "training_shift": 3.0},
    ),
    "huber": (
        {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "seed": 2, "max_grad_norm": 0.5},
        {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "max_grad_norm": 0.5},
    ),
    "adafactor": (
        {"optimizer_type": "Adafactor", "seed": 3, "network_args": ["x_mlp_dim=2", "conv_dim=4"]},
        {
            "optimizer_type": "Adafactor",
            "optimizer_args": ["relative_step=True", "scale_parameter=True"],
            "network_args": ["x_mlp_dim=2"],
        },
    ),
    "mode": (
        {"weighting_scheme": "mode", "mode_scale": 1.0, "network_dropout": 0.1, "seed": 4, "noise_offset": 0.1},
        {"weighting_scheme": "mode", "mode_scale": 1.0, "network_dropout": 0.1},
    ),
}
STYLES = ("bash", "cmd", "powershell", "config", "gui")


def command_file(folder: Path, options: dict[str, Any], style: str) -> Path:
    """Writes the options as the style has them, and returns the file."""
    words = []
    for name, value in options.items():
        values = " ".join(map(str, value)) if isinstance(value, list) else value
        words.append(
            f"--{name}"
            if value is True
            else f'--{name} "{values}"'
            if name == "train_data_dir"
            else f"--{name} {values}"
        )
    match style:
        case "config":
            lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
            return written(folder / "config.toml", "[settings]\n" + "\n".join(lines))
        case "gui":
            names = {"resolution": "max_resolution", "optimizer_type": "optimizer"}
            settings = {names.get(name, name): value for name, value in options.items()}
            if "network_args" in settings:
                settings["network_args"] = " ".join(settings["network_args"])
            return written(folder / "gui.json", json.dumps({**settings, "sd3_checkbox": True, "clip_skip": 1}))
    suffix, end = {"bash": ("sh", "\\"), "cmd": ("bat", "^"), "powershell": ("ps1", "`")}[style]
    lines = ["accelerate launch sd3_train_network.py", *words]
    return written(folder / f"train.{suffix}", f" {end}\n  ".join(lines) + "\n")


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


@pytest.fixture
def options(tmp_path) -> dict[str, Any]:
    """What each command says: a picture of a folder, and where everything goes."""
    pictures = tmp_path / "my pictures" / "2_a red circle"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, 90, 30)).save(pictures / "0.png")
    return {
        "pretrained_model_name_or_path": str(MODEL), "train_data_dir": str(pictures.parent), "resolution": "64,64",
        "output_dir": str(tmp_path / "loras"), "output_name": "mine", "network_module": "networks.lora_sd3",
        "network_dim": 2, "learning_rate": 1e-4, "max_train_steps": 2, "network_train_unet_only": True, "sdpa": True,
        "cache_latents": True, "max_data_loader_n_workers": 0,
    }  # fmt: skip


def translate(folder: Path, options: dict[str, Any], style: str) -> tuple[str, dict[str, str]]:
    """Translates a command of a style; returns what was told, and the project's files."""
    if style == "gui":  # where an empty field is 0
        options = {**options, "LoRA_type": "Standard"}
    source = command_file(folder, options, style)
    told = forked("from-kohya", source, "--out", folder / style, "--tokenizers", TOKENIZERS, cwd=folder).stdout
    files = [path for path in (folder / style).rglob("*") if path.is_file()]
    return told, {str(path.relative_to(folder / style)): path.read_text().replace(source.name, "") for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_styles_of_a_command_are_one_project(setting, options, tmp_path):
    said, _ = SETTINGS[setting]
    (told, first), *others = [translate(tmp_path, {**options, **said}, style) for style in STYLES]
    assert ("conv_dim=4" in told) == ("network_args" in said)
    assert "stages/train.toml" in first
    for style, (_, files) in zip(STYLES[1:], others, strict=True):
        assert files == first, style


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_command_trains_as_it_says(setting, options, tmp_path):
    said, told_of = SETTINGS[setting]
    wanted = {**UNSAID, "seed": said["seed"], **told_of}
    translate(tmp_path, {**options, **said}, "bash")
    sd3pipe("run", cwd=tmp_path / "bash")
    report = json.loads((tmp_path / "bash" / "runs" / "mine" / "report.json").read_text())
    assert report["steps"] == 2
    assert {name: report["identity"][name] for name in wanted} == wanted
    assert (tmp_path / "bash" / "exports" / "mine.safetensors").is_file()
    assert (tmp_path / "loras" / "mine.safetensors").is_file()
