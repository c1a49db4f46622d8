"""The ranks that torchrun starts fill one cache together, byte for byte what one process makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import sd3pipe
from support.comparing import folder_bytes
from support.tiny_base import write_tiny_base

from sd3pipe.cache.reader import CacheReader

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64))  # a bucket and so a segment each: both ranks have some to make


@pytest.fixture
def dataset(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        Image.radial_gradient("L").rotate(30 * number).resize(SIZES[number % 4]).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"picture {number}")
    file = tmp_path / "dataset.toml"
    buckets = "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32"
    file.write_text(f"[[datasets]]\n{buckets}\n[[datasets.subsets]]\nimage_dir = '{photos}'\n")
    return file


def torchrun(ranks, arguments, cwd):
    """Runs one command line in every rank; nothing but torchrun's variables tells them apart."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "--no-python", str(Path(sys.executable).with_name("sd3pipe")), *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def encoded_counts(output):
    """Returns how many rows each rank says that it encoded."""
    lines = [line for line in output.splitlines() if " encoded, " in line]
    return [int(line.partition(" encoded, ")[0].rpartition(" ")[2]) for line in lines]


@pytest.mark.slow
def test_two_ranks_give_the_folder_that_one_process_gives(tmp_path, dataset):
    base = write_tiny_base(tmp_path / "base")
    about = [f"--model={base.model}", f"--dataset={dataset}", "--threads=1"]
    latents = ["encode-latents", *about]
    text = ["encode-text", *about, *map(str, base.encoder_options())]
    for command, name in ((latents, "latents"), (text, "text")):
        sd3pipe(*command, f"--out={tmp_path / 'one' / name}")
        output = torchrun(2, [*command, f"--out={tmp_path / 'two' / name}"], cwd=tmp_path)
        counts = encoded_counts(output)
        assert len(counts) == 2 and sum(counts) == len(CacheReader(tmp_path / "two" / name)), output
        assert all(counts) or name == "text", "a text cache so small is one segment, which one rank makes"
        assert folder_bytes(tmp_path / "one" / name) == folder_bytes(tmp_path / "two" / name)
