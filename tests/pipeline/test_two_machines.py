"""What `pack` lists is all that a second machine needs: it trains the adapter that the first would have trained."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import sd3pipe
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

TRAIN = """
import json, sys
from sd3pipe.cli import run
code = run(["train"])
loaded = sorted(name for name in ("transformers", "tokenizers", "PIL", "diffusers", "peft") if name in sys.modules)
print(json.dumps({"code": int(code), "loaded": loaded}))
"""


def edit_stages(folder: Path) -> None:
    train = folder / "stages" / "train.toml"
    text = train.read_text().replace("max_train_steps = 2000", "max_train_steps = 3")
    train.write_text(text.replace("network_dim = 16", "network_dim = 2") + "\nthreads = 1\n")


def train(folder: Path) -> str:
    """Trains in a project's folder and returns what the process says of itself: exit code and libraries loaded."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_packed_files_train_the_same_adapter_without_pictures_or_encoders(tmp_path):
    base = write_tiny_base(tmp_path / "base", variant="sd35-large", layout="separate")
    images = write_photographs(tmp_path / "images", ("chelsea.png", "coffee.png"), 96)
    a, b = tmp_path / "a", tmp_path / "b"
    sd3pipe(
        "init", a, "--model", base.model, "--images", images, "--tokenizers", base.tokenizers, "--resolution", 64,
        "--name", "photos", cwd=tmp_path,
    )  # fmt: skip
    (a / "sample_prompts.txt").unlink()
    project = a / "project.toml"
    project.write_text("\n".join(line for line in project.read_text().splitlines() if "sample_prompts" not in line))
    edit_stages(a)
    sd3pipe("run", "encode-text", "encode-latents", cwd=a)
    for name in sd3pipe("pack", "--list-only", cwd=a).stdout.splitlines():
        (b / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(a / name, b / name)

    assert train(a) == '{"code": 0, "loaded": []}'
    a.rename(tmp_path / "a-gone")
    images.rename(tmp_path / "images-gone")
    for encoder in (base.clip_l, base.clip_g, base.t5xxl):
        assert encoder is not None
        encoder.unlink()
    shutil.rmtree(base.tokenizers)
    assert train(b) == '{"code": 0, "loaded": []}'

    final = Path("runs") / "photos" / "final"
    for name in ("adapter.safetensors", "inputs.json"):
        assert (b / final / name).read_bytes() == (tmp_path / "a-gone" / final / name).read_bytes(), name
