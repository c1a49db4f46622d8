"""A cache written for other training engines: samples come back to the bit, by their readers and by the page's."""

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_training
from support.comparing import folder_bytes
from support.fake_cache import wanted_texts

from sd3pipe import cli
from sd3pipe.cache import sample_export
from sd3pipe.cache.join import join_pictures
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.store import fill_cache
from sd3pipe.cache.tensors import row_from_torch, row_to_torch

COUNT = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    drawn = enumerate(tiny_training.pictures(COUNT, flips=True))
    mixed = [replace(picture, masked=number % 2 == 0) for number, picture in drawn]
    return tiny_training.make_inputs(tmp_path_factory.mktemp("inputs"), mixed)


@pytest.fixture(autouse=True)
def several_shards(monkeypatch):
    monkeypatch.setattr(sample_export, "_SHARD_BYTES", 50_000)


def export(*words):
    return cli.run(["cache", "export", *map(str, words)])


def expected(inputs):
    """Every pair of a latents row and its picture's first caption, in the order of the joined pictures."""
    latents, text = CacheReader(inputs.latents), CacheReader(inputs.text)
    joined = join_pictures(latents, text)
    for picture, name in enumerate(joined.names):
        words = text.row(int(joined.captions.rows[joined.captions.starts[picture]]))
        for row in joined.latents.rows[joined.latents.starts[picture] : joined.latents.starts[picture + 1]]:
            tensors = {name: tensor.numpy() for name, tensor in {**latents.row(int(row)), **words}.items()}
            tensors.setdefault("mask", np.ones(tensors["moments"].shape[1:], np.float32))
            yield name, tensors


def assert_are_expected(found, inputs):
    wanted = list(expected(inputs))
    assert len(found) == len(wanted) == 2 * COUNT
    for sample, (name, tensors) in zip(found, wanted, strict=True):
        assert sample["name"] == name
        for key, values in tensors.items():
            assert sample[key].dtype == values.dtype and np.array_equal(sample[key], values), key


def read_tars(folder):
    samples = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                data = tar.extractfile(member).read()
                values = json.loads(data) if name == "json" else {name.removesuffix(".npy"): np.load(io.BytesIO(data))}
                samples.setdefault(key, {}).update(values)
    return [samples[key] for key in sorted(samples)]


def documented(section):
    """Returns the function that the page shows for a format."""
    page = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(encoding="utf-8")
    code = re.search(rf"### {section}.*?```python\n(.*?)```", page, re.DOTALL)[1]
    names = {}
    exec(compile(code, section, "exec"), names)
    return names


READERS = {
    "webdataset": read_tars,
    "mds": lambda folder: documented("MDS")["samples"](folder),
    "litdata": lambda folder: documented("LitData")["samples"](folder),
}


def test_tars_hold_every_sample(inputs, tmp_path):
    assert export(inputs.latents, "--text", inputs.text, "--format", "webdataset", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) > 1
    assert_are_expected(read_tars(tmp_path / "out"), inputs)
    empty = np.load(tmp_path / "out" / "empty_caption.npz")
    text = CacheReader(inputs.text)
    row = text.row(text.manifest.extra["empty_caption"])
    assert {name: empty[name].tobytes() for name in empty} == {name: t.numpy().tobytes() for name, t in row.items()}
    assert [made["kind"] for made in json.loads((tmp_path / "out" / "sd3pipe.json").read_text())] == ["latents", "text"]


def test_webdataset_reads_the_tars(inputs, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    assert export(inputs.latents, "--text", inputs.text, "--format", "webdataset", "--out", tmp_path / "out") == 0
    samples = documented("WebDataset")["samples"](str(tmp_path / "out"))
    assert_are_expected(list(samples), inputs)


def test_the_pages_reader_of_mds_reads_every_sample(inputs, tmp_path):
    assert export(inputs.latents, "--text", inputs.text, "--format", "mds", "--out", tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["shards"]) > 1
    assert_are_expected(list(documented("MDS")["samples"](str(tmp_path / "out"))), inputs)


def test_the_pages_reader_of_litdata_reads_every_sample(inputs, tmp_path):
    assert export(inputs.latents, "--text", inputs.text, "--format", "litdata", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.bin"))) > 1
    assert_are_expected(list(documented("LitData")["samples"](str(tmp_path / "out"))), inputs)


def test_litdata_reads_the_chunks(inputs, tmp_path):
    litdata = pytest.importorskip("litdata", reason="litdata is not installed: it asks for torchvision")
    assert export(inputs.latents, "--text", inputs.text, "--format", "litdata", "--out", tmp_path / "out") == 0
    assert_are_expected(list(litdata.StreamingDataset(str(tmp_path / "out"))), inputs)


@pytest.mark.parametrize("form", ["webdataset", "mds", "litdata"])
def test_packed_states_are_written_dense(tmp_path, form):
    states_LD = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    row = row_from_torch({"t5xxl": states_LD, "mask_t5": torch.ones(4, dtype=torch.uint8)}, packed=["t5xxl"])
    wanted = wanted_texts(["one"])
    fill_cache(tmp_path / "cache", wanted, lambda keys: ((key, row) for key in keys), made_with="packed 1")
    assert export(tmp_path / "cache", "--format", form, "--out", tmp_path / "out") == 0
    (sample,) = READERS[form](tmp_path / "out")
    assert {"t5xxl", "mask_t5"} < set(sample) and "t5xxl_scale" not in sample
    assert np.array_equal(sample["t5xxl"], row_to_torch(row)["t5xxl"].numpy())


@pytest.mark.parametrize("form", ["webdataset", "mds", "litdata"])
def test_one_cache_alone_has_its_own_columns_and_the_same_bytes_each_time(inputs, tmp_path, form):
    for out in ("a", "b"):
        assert export(inputs.latents, "--format", form, "--out", tmp_path / out) == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    samples = list(READERS[form](tmp_path / "a"))
    assert [sample["flip"] for sample in samples[:2]] == [0, 1]
    assert set(samples[0]) == {
        "bucket_h", "bucket_w", "crop", "flip", "mask", "moments", "name", "original_h", "original_w", "split", "subset"
    }  # fmt: skip
    assert not (tmp_path / "a" / "empty_caption.npz").exists()


def test_what_cannot_be_exported_is_refused(inputs, tmp_path, capsys):
    assert export(inputs.latents, "--text", inputs.text, "--out", tmp_path / "x") == 2
    assert "--text joins samples" in capsys.readouterr().err
    assert export(inputs.text, "--text", inputs.latents, "--format", "mds", "--out", tmp_path / "x") == 3
    (tmp_path / "there").mkdir()
    assert export(inputs.latents, "--format", "mds", "--out", tmp_path / "there") == 3
    assert not (tmp_path / "x").exists()
