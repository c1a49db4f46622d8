"""An encode stage with nothing to do says so, loads nothing heavy, and is quick."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.command_line import report_of, sd3pipe

from sd3pipe import cli
from sd3pipe.cache.rows import from_numpy
from sd3pipe.file_stamps import stamp_of

HEAVY = {"torch", "transformers", "tokenizers", "PIL", "zarr", "safetensors", "rich"}


def write_dataset(folder, count):
    """Writes `count` small pictures of different bytes, with captions, and returns the dataset file."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    Image.new("RGB", (64, 64), (7, 7, 7)).save(folder / "one.png")
    png = (folder / "one.png").read_bytes()
    for number in range(count):
        (photos / f"{number:06}.png").write_bytes(png + str(number).encode())  # decoders stop at the end of the picture
        (photos / f"{number:06}.txt").write_text(f"picture {number}")
    dataset = folder / "dataset.toml"
    dataset.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{photos}'\n")
    return dataset


def stamps(folder):
    return {path: stamp_of(path.stat()) for path in folder.rglob("*")}


def latents_command(base, dataset):
    return ["encode-latents", f"--model={base.model}", f"--dataset={dataset}", f"--out={dataset.parent / 'latents'}"]


def text_command(base, dataset):
    options = [f"--dataset={dataset}", f"--out={dataset.parent / 'text'}"]
    return ["encode-text", f"--model={base.model}", *base.encoder_options(), *options]


def test_nothing_heavy_is_imported_and_nothing_is_written(base, tmp_path):
    dataset = write_dataset(tmp_path, 4)
    for command, out in ((latents_command, "latents"), (text_command, "text")):
        sd3pipe(*command(base, dataset))
        before = stamps(tmp_path / out)
        run = [sys.executable, "-X", "importtime", "-m", "sd3pipe", *command(base, dataset)]
        # in a folder of its own, for the repository's is a project with parameters
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
        imported = set(re.findall(r"\|\s+(\w+)$", done.stderr, re.MULTILINE))
        assert "numpy" in imported and not imported & HEAVY
        report = report_of(tmp_path / out)
        assert report["encoded"] == 0 and report["reused"] >= 4
        assert stamps(tmp_path / out) == before


@pytest.mark.slow
def test_ten_thousand_pictures_are_checked_in_under_three_seconds(base, tmp_path, monkeypatch):
    """CPU seconds, which other processes of the machine do not change as they do the time on the wall."""
    dataset = write_dataset(tmp_path, 10_000)
    row = {"moments": from_numpy(np.zeros((32, 8, 8), np.float16))}
    monkeypatch.setattr("sd3pipe.encoding.latent_rows.encoded_rows", lambda keys, *_: ((key, row) for key in keys))
    assert cli.run(latents_command(base, dataset)) == 0
    before = os.times()
    done = sd3pipe(*latents_command(base, dataset))
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert "10000 reused" in done.stdout.replace(",", "") and seconds < 3.0, seconds
