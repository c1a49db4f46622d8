"""--engine ray: two workers of a Ray on this machine fill a cache as one process does, also when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from support.command_line import report_of, sd3pipe
from support.comparing import folder_bytes
from support.tiny_captioners import blip

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cli import run
from sd3pipe.encoding.ray_engine import fill_parts
from sd3pipe.errors import StaleError

pytest.importorskip("ray", reason='needs Ray: pip install "sd3pipe[ray]"')
SIZES = tuple((64 + 32 * wide, 64 + 32 * high) for wide in range(3) for high in range(3))  # a bucket and a segment each
LONG = "so many words " * 20
ON_RAY = ("--engine", "ray", "--ray-workers", "2")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """27 pictures in nine buckets; one of them is broken, one has a long caption."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(27):
        Image.radial_gradient("L").rotate(13 * number).resize(SIZES[number % 9]).save(photos / f"{number:02d}.png")
        (photos / f"{number:02d}.txt").write_text(LONG if number == 5 else f"picture {number}")
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").write_bytes(whole[: len(whole) // 2])
    file = tmp_path / "dataset.toml"
    buckets = (
        "resolution = 128\nenable_bucket = true\nbucket_no_upscale = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32"
    )
    file.write_text(f"[[datasets]]\n{buckets}\n[[datasets.subsets]]\nimage_dir = '{photos}'\n")
    return file


def kill_a_worker(out, deadline):
    """Kills the first process that registers as a writer of a cache, and returns its number."""
    while time.monotonic() < deadline:
        for card in CacheFolder(out).writers.glob("*/writer.json"):
            try:
                pid = json.loads(card.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
            except (OSError, ValueError):
                continue  # half written, or gone already
            return pid
        time.sleep(0.01)
    raise AssertionError("no worker began to write")


@pytest.mark.slow
def test_a_killed_worker_s_part_is_made_by_another(tmp_path, base, dataset):
    command = ["encode-latents", f"--model={base.model}", f"--dataset={dataset}", "--device=cpu"]
    sd3pipe(*command, f"--out={tmp_path / 'one'}")
    out = tmp_path / "two"
    driver = subprocess.Popen(
        [sys.executable, "-m", "sd3pipe", *command, f"--out={out}", *ON_RAY],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    killed = kill_a_worker(out, time.monotonic() + 120)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    assert killed != driver.pid
    assert folder_bytes(out) == folder_bytes(tmp_path / "one")
    report = report_of(out)
    assert (report["encoded"], report["failed"], report["left"]) == (26, 1, 0)
    assert report["reused"] == 0
    before = folder_bytes(out)
    sd3pipe(*command, f"--out={out}", *ON_RAY)  # without work Ray is not even started
    assert report_of(out)["encoded"] == 0 and report_of(out)["seconds"] < 5
    assert folder_bytes(out) == before


@pytest.mark.slow
def test_a_captioner_s_words_too(tmp_path, dataset):
    command = [
        "caption",
        f"--images={dataset.parent / 'photos'}",
        f"--captioner={blip(tmp_path / 'blip')}",
        "--write=none",
        "--device=cpu",
    ]
    command += ["--captioner-dtype=float32", "--max-new-tokens=6"]
    sd3pipe(*command, f"--out={tmp_path / 'one'}")
    sd3pipe(*command, f"--out={tmp_path / 'two'}", *ON_RAY)
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert two["captioned"] == one["captioned"] == 26 and two["failed"] == one["failed"] == 1


@pytest.mark.slow
def test_captions_too(tmp_path, base, dataset):
    command = ["encode-text", f"--model={base.model}", f"--dataset={dataset}", *map(str, base.encoder_options())]
    sd3pipe(*command, f"--out={tmp_path / 'one'}")
    sd3pipe(*command, f"--out={tmp_path / 'two'}", *ON_RAY)
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert two["encoded"] == one["encoded"] > 20
    assert two["cut"] == one["cut"] != []


@pytest.mark.long
def test_an_address_at_which_nobody_answers_is_named(base, dataset, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert run(["encode-latents", f"--model={base.model}", f"--dataset={dataset}", "--out=out", "--engine=ray"]) == 2
    assert "RAY_ADDRESS=127.0.0.1:1: no cluster answers there" in capsys.readouterr().err


@pytest.mark.slow
def test_the_error_of_a_part_is_the_command_s_own(dataset):
    def make_fill():  # in here, since workers cannot import tests
        def fill(shard):
            if shard[0] == 1:
                raise StaleError("another plan is being filled")

        return fill

    with pytest.raises(StaleError, match="another plan is being filled"):
        fill_parts("encode", make_fill, parts_per_worker=2, workers=1, on_cpu=True)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--ray-workers", "2"), "--ray-workers is for --engine ray"),
        (("--engine", "ray", "--shard", "0/2"), "leave --shard out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(base, dataset, capsys, words, complaint):
    assert run(["encode-latents", f"--model={base.model}", f"--dataset={dataset}", "--out=out", *words]) == 2
    assert complaint in capsys.readouterr().err
