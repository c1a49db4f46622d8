"""Text files that a user names, or that lie among pictures: a pipe hangs nothing, a device is not drained."""

import os
from pathlib import Path

import pytest
from PIL import Image

from sd3pipe.adapters.metadata import thumbnail_url
from sd3pipe.cli import run
from sd3pipe.config import read_toml
from sd3pipe.data import places
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.prompts import load_prompts
from sd3pipe.data.scan import scan
from sd3pipe.errors import Sd3pipeError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.vocabularies import read_clip_vocabulary, read_t5_vocabulary
from sd3pipe.project.kohya import Translation
from sd3pipe.project.kohya_dataset import dataset_blocks
from sd3pipe.project.kohya_source import read_command, read_config, read_source

ZEROS = Path("/dev/zero")
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


def scan_with(path, subset):
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (path.parent / "d.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n"
    )
    return scan(load_dataset(path.parent / "d.toml"), FileStamps(path.parent / "stat.json", trust=False))


def caption(path):
    folder = path.parent / "pictures"
    folder.mkdir()
    path.rename(folder / "a.txt")
    scan_with(path, "")


READERS = {
    "prompts.txt": load_prompts,
    "prompts.toml": load_prompts,
    "prompts.json": load_prompts,
    "dataset.toml": load_dataset,
    "dataset.json": load_dataset,
    "config.toml": read_toml,
    "kohya.toml": read_config,
    "gui.json": lambda path: read_source([str(path)]),
    "kohya.json": lambda path: dataset_blocks({"dataset_config": str(path)}, Translation()),
    "thumbnail.png": thumbnail_url,
    "metadata.json": lambda path: scan_with(path, f"metadata_file = '{path}'"),
    "metadata.jsonl": lambda path: scan_with(path, f"metadata_file = '{path}'"),
    "metadata.csv": lambda path: scan_with(path, f"metadata_file = '{path}'"),
    "caption": caption,
    "tokenizer.json": lambda path: (read_clip_vocabulary(path.parent), read_t5_vocabulary(path.parent)),
    "spiece.model": lambda path: read_t5_vocabulary(path.parent),
}


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
@pytest.mark.parametrize("name", READERS)
def test_an_input_that_is_no_bounded_file_is_refused(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(ZEROS)
    else:
        path.touch()
        os.truncate(path, 3_000_000_000)
    with pytest.raises(Sd3pipeError) as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


def test_pictures_that_are_no_bounded_file_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 5000)
    folder = tmp_path / "pictures"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zeros.png").symlink_to(ZEROS)
    (folder / "huge.png").write_bytes(bytes(5001))
    found = scan_with(tmp_path / "d", "")
    assert [picture.name for picture in found.pictures] == ["a.png"]
    assert {broken.place.file.name: broken.reason for broken in found.unreadable} == {
        "pipe.png": "it is no regular file",
        "zeros.png": "it is no regular file",
        "huge.png": "the file is larger than 5,000 bytes",
    }


WRONG = ["datasets = 3", "datasets = [3]", "[[datasets]]\nsubsets = 3", "[[datasets]]\nsubsets = [3]", "general = 1"]


@pytest.mark.parametrize("tables", WRONG)
def test_a_dataset_of_the_wrong_shape_is_refused(tmp_path, tables):
    (tmp_path / "k.toml").write_text(tables)
    with pytest.raises(Sd3pipeError, match=r"k\.toml: "):
        dataset_blocks({"dataset_config": str(tmp_path / "k.toml")}, Translation())


@pytest.mark.parametrize("command", ["'", "--config_file"])
def test_a_command_that_is_none_is_refused(command):
    with pytest.raises(Sd3pipeError):
        read_command(command)


def test_a_number_without_end_stays_a_word():
    assert read_command("--lr_warmup_steps inf --learning_rate nan") == {
        "lr_warmup_steps": "inf",
        "learning_rate": "nan",
    }


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path, capsys):
    name = "n" * 5000
    (tmp_path / "d.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{name}'\n")
    assert run(["preview", "--dataset", str(tmp_path / "d.toml"), "--out", str(tmp_path / "out")]) == 3
    assert "too long" in capsys.readouterr().err
