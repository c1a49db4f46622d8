"""Two captioners, two lines: both become rows of a picture, and train draws from both."""

import pytest
from support.command_line import report_of
from support.photographs import write_photographs
from support.tiny_captioners import blip

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cli import run as run_command
from sd3pipe.params.train import TrainParams
from sd3pipe.training.batches import epoch_batches
from sd3pipe.training.training_data import open_data

PICTURES = ("chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture
def caption(tmp_path, monkeypatch):
    """Runs the command on photographs, one of which has a person's caption; returns its report."""
    monkeypatch.chdir(tmp_path)
    for file in write_photographs(tmp_path / "pictures", PICTURES, 48).glob("*.txt"):
        if file.stem != "rocket":
            file.unlink()
    captioner = blip(tmp_path / "blip")
    (tmp_path / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pictures'\nenable_wildcard = true\n"
    )

    def run(out, *options, code=0):
        words = ["caption", "--dataset", "dataset.toml", "--captioner", captioner, "--out", f"caches/{out}"]
        words += ["--device", "cpu", "--captioner-dtype", "float32", "--max-new-tokens", 6, "--threads", 1, *options]
        assert run_command([str(word) for word in words]) == code
        return report_of(tmp_path / "caches" / out) if code == 0 else {}

    return run


def sd3pipe(*words):
    assert run_command([str(word) for word in words]) == 0


def lines(folder):
    return {file.stem: file.read_text().splitlines() for file in (folder / "pictures").glob("*.txt")}


@pytest.mark.long
def test_words_of_two_models_are_encoded_and_both_are_trained_on(tmp_path, base, caption):
    caption("captions", "--prompt", "a red")
    report = caption("tags", "--prompt", "a small", "--lines-of", "caches/captions")
    assert (report["written"], report["kept_by_hand"]) == (2, 1)
    written = lines(tmp_path)
    assert len(written["rocket"]) == 1  # a person's
    for name in ("chelsea", "coffee"):
        assert [line[:5] for line in written[name]] == ["a sma", "a red"]
    words = ("--model", base.model, "--dataset", "dataset.toml", "--threads", 1)
    encoders = base.encoder_options()
    sd3pipe("encode-text", *words, *encoders, "--out", "caches/text", "--t5xxl-max-token-length", 16,
               "--caption-variants", 2)  # fmt: skip
    sd3pipe("encode-latents", *words, "--out", "caches/latents", "--max-data-loader-n-workers", 0)
    text = CacheReader(tmp_path / "caches" / "text")
    samples = text.samples.to_columns(text.keys)
    rows = {
        name: {key for key, other in zip(samples["key"], samples["name"], strict=True) if other == name}
        for name in PICTURES
    }
    assert {name: len(keys) for name, keys in rows.items()} == {"chelsea.png": 2, "coffee.png": 2, "rocket.jpg": 1}
    data = open_data(
        TrainParams(
            model=str(base.model), text=tmp_path / "caches/text", latents=tmp_path / "caches/latents",
            out=tmp_path / "run",
        )
    )  # fmt: skip
    drawn = {name: set() for name in PICTURES}
    for epoch in range(2):
        for batch in epoch_batches(data.train, seed=1, epoch=epoch, batch_size=1):
            for picture, row in zip(batch.pictures, batch.text_rows, strict=True):
                drawn[data.train.names[picture]].add(bytes(text.keys[row]).hex())
    assert {name.rpartition("/")[2]: keys for name, keys in drawn.items()} == rows


@pytest.mark.long
def test_the_second_words_are_ours_as_the_first_and_undo_goes_back_to_them(tmp_path, caption):
    caption("captions", "--prompt", "a red")
    first = lines(tmp_path)
    (tmp_path / "pictures" / "coffee.txt").write_text("touched")
    assert caption("tags", "--prompt", "a small", "--lines-of", "caches/captions")["written"] == 1
    assert lines(tmp_path)["coffee"] == ["touched"] and len(lines(tmp_path)["chelsea"]) == 2
    assert caption("captions", "--prompt", "a red", "--trigger", "ohwx")["written"] == 0  # the lines are the tags' now
    sd3pipe("caption", "--dataset", "dataset.toml", "--out", "caches/tags", "--undo")
    assert lines(tmp_path) == {**first, "coffee": ["touched"]}


def test_a_cache_without_captions_is_named_before_anything_is_captioned(tmp_path, caption, capsys):
    caption("tags", "--lines-of", "caches/captions", code=3)
    assert "captions: has no captions.jsonl: run `sd3pipe caption` first" in capsys.readouterr().err
    assert set(lines(tmp_path)) == {"rocket"}
