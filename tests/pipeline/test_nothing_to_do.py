"""An encode stage with nothing to do says so, loads nothing heavy, and is quick."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from support.command_line import in_process, report_of, sd3pipe
from support.tiny_captioners import blip

from sd3pipe import cli, watched
from sd3pipe.cache.rows import from_numpy
from sd3pipe.data import findings
from sd3pipe.encoding import stage
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


@pytest.fixture
def fine_clock(monkeypatch):
    """Files are old enough to be trusted after a moment, not after the two seconds of the coarsest file system."""
    monkeypatch.setattr(watched, "COARSE_CLOCK_NS", 50_000_000)


def latents_command(base, dataset):
    options = [f"--dataset={dataset}", f"--out={dataset.parent / 'latents'}", "--max-data-loader-n-workers=0"]
    return ["encode-latents", f"--model={base.model}", *options]


def text_command(base, dataset):
    options = [f"--dataset={dataset}", f"--out={dataset.parent / 'text'}"]
    return ["encode-text", f"--model={base.model}", *base.encoder_options(), *options]


@pytest.mark.long
def test_nothing_heavy_is_imported_and_nothing_is_written(base, tmp_path):
    dataset = write_dataset(tmp_path, 4)
    for command, out in ((latents_command, "latents"), (text_command, "text")):
        in_process(*command(base, dataset))
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


@pytest.mark.slow
def test_ten_thousand_captions_are_checked_in_under_five_seconds(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path, 10_000)
    command = ["caption", f"--dataset={dataset}", f"--captioner={blip(tmp_path / 'blip')}", "--write=none"]
    command.append(f"--out={tmp_path / 'captions'}")
    row = {"caption": from_numpy(np.frombuffer(b"a harbour", np.uint8))}
    monkeypatch.setattr("sd3pipe.captioning.caption_rows.load_captioner", lambda *_: None)
    monkeypatch.setattr("sd3pipe.captioning.caption_rows.captioned_rows", lambda pictures, *_: (row for _ in pictures))
    monkeypatch.setattr("sd3pipe.data.looks.find_nearest", lambda *_: None)  # here all are alike
    assert cli.run(command) == 0
    before = os.times()
    done = sd3pipe(*command)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert "10000 reused" in done.stdout.replace(",", "") and seconds < 5.0, seconds


def edit(dataset):
    (dataset.parent / "photos" / "000001.txt").write_text("picture X")


def edit_unseen(dataset):
    picture = dataset.parent / "photos" / "000001.png"
    before = picture.stat()
    picture.write_bytes(picture.read_bytes()[:-1] + b"9")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))


def add_in_a_new_folder(dataset):
    more = dataset.parent / "photos" / "more"
    more.mkdir()
    (more / "x.png").write_bytes((dataset.parent / "one.png").read_bytes())


def change_the_dataset_file(dataset):
    dataset.write_text(dataset.read_text() + "caption_prefix = 'a'\nflip_aug = true\n")


def lose_a_segment(dataset):
    for out in ("latents", "text"):
        next((dataset.parent / out / "segments").iterdir()).unlink()


def leave_a_stray(dataset):
    for out in ("latents", "text"):
        (dataset.parent / out / "segments" / "stray.txt").write_text("")


CHANGES = {
    edit: {"text"},
    edit_unseen: {"latents", "text"},
    add_in_a_new_folder: {"latents", "text"},
    change_the_dataset_file: {"latents", "text"},
    lose_a_segment: {"latents", "text"},
    leave_a_stray: {"latents", "text"},
}


@pytest.fixture
def scans(monkeypatch):
    """The folders that were scanned."""
    seen = []
    scan = stage.scan
    monkeypatch.setattr(
        stage, "scan", lambda dataset, *rest, **more: seen.append(dataset) or scan(dataset, *rest, **more)
    )
    return seen


@pytest.mark.long
def test_a_second_run_says_the_same_without_a_scan(base, tmp_path, fine_clock, scans, capsys):
    dataset = write_dataset(tmp_path, 3)
    (tmp_path / "photos" / "000002.txt").unlink()
    (tmp_path / "photos" / "000003.png").write_bytes(b"no picture")
    time.sleep(0.1)
    for command, out in ((latents_command, "latents"), (text_command, "text")):
        said, reports = [], []
        options = ["--max-quarantined=1"] if out == "latents" else []
        for _ in range(3):
            assert cli.run([*command(base, dataset), *options]) == 0
            said.append(re.sub(r"[0-9.]+ s$", "", "".join(capsys.readouterr()), flags=re.MULTILINE))
            reports.append({**report_of(tmp_path / out), "seconds": 0})
        assert said[1] == said[2] and "warning" in said[1] and reports[1] == reports[2]
        assert len(scans) == 1
        scans.clear()


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_found(base, tmp_path, fine_clock, scans, change):
    dataset = write_dataset(tmp_path, 3)
    dataset.write_text(dataset.read_text() + "recursive = true\n")
    time.sleep(0.1)
    commands = {"latents": latents_command(base, dataset), "text": text_command(base, dataset)}
    for command in commands.values():
        assert cli.run(command) == 0
    change(dataset)
    for out, command in commands.items():
        scans.clear()
        assert cli.run(command) == 0
        assert bool(scans) == (out in CHANGES[change])


@pytest.mark.long
def test_another_option_and_distrust_look_again(base, tmp_path, fine_clock, scans):
    dataset = write_dataset(tmp_path, 2)
    time.sleep(0.1)
    for more in ([], ["--latent-mode=mean"], ["--latent-mode=mean", "--rehash"]):
        assert cli.run([*latents_command(base, dataset), *more]) == 0
    assert len(scans) == 3


@pytest.fixture
def plugins(monkeypatch):
    """The versions of Pillow and its plugins that are installed."""
    versions = {"pillow": "1"}
    monkeypatch.setattr(findings, "_version", versions.get)
    yield versions
    findings.decoder.cache_clear()


@pytest.mark.long
def test_a_new_plugin_of_the_decoder_looks_again(base, tmp_path, fine_clock, scans, plugins):
    dataset = write_dataset(tmp_path, 2)
    (tmp_path / "photos" / "phone.heic").write_bytes(b"no picture without a plugin")
    time.sleep(0.1)
    for heif in ("", "", "1", "1", "2"):
        plugins["pillow-heif"] = heif
        findings.decoder.cache_clear()
        assert cli.run([*latents_command(base, dataset), "--max-quarantined=1"]) == 0
    assert len(scans) == 3


def test_a_file_that_was_changed_a_moment_ago_is_looked_into_again(base, tmp_path, scans):
    dataset = write_dataset(tmp_path, 2)
    for _ in range(2):
        assert cli.run(latents_command(base, dataset)) == 0
    assert len(scans) == 2


@pytest.mark.long
def test_caches_of_one_dataset_share_one_look_at_its_files(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "a.txt", "sub/b.png"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    dataset = tmp_path / "dataset.toml"
    dataset.write_text("")
    folders = [
        [watched.Watched(folder=str(tmp_path), endings=endings, recursive=True)]
        for endings in ((".png",), (".png", ".txt"))
    ]
    time.sleep(watched.COARSE_CLOCK_NS / 1e9 + 0.05)
    apart = [watched.state_of(dataset, those) for those in folders]
    listed = []
    monkeypatch.setattr(os, "scandir", lambda folder, scan=os.scandir: listed.append(folder) or scan(folder))
    look = watched.Look()
    assert [watched.state_of(dataset, those, look) for those in folders] == apart and None not in apart
    assert sorted(listed) == [str(tmp_path), str(tmp_path / "sub")]
    (tmp_path / "a.txt").write_text("other")
    assert watched.state_of(dataset, folders[1]) is None  # too young to be told by its stat
