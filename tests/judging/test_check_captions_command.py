"""`check-captions`: every answer is made once, whoever asks; what is asked of an adapter adds to it."""

import json
import shutil

import pytest
import torch
from support.tiny_training import make_inputs, pictures

from sd3pipe.adapters.files import save_adapter
from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.commands import check_captions
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.params.check_captions import CheckCaptionsParams

DATASET = [*pictures(4), *pictures(5, split="validation")[4:]]
OTHERS, LEVELS, DRAWS = 3, 2, 2
OF_THE_BASE = len(DATASET) * (1 + 1 + OTHERS) * LEVELS * DRAWS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("captions"), DATASET)


def check(inputs, out, **options):
    given = {
        "model": str(inputs.model), "text": inputs.text, "latents": inputs.latents, "threads": 1, "sigmas": "0.3,0.7",
        "draws": DRAWS, "other_captions": OTHERS, **options,
    }  # fmt: skip
    check_captions.main(CheckCaptionsParams(out=out, **given))
    return json.loads(out.read_text()) if out.exists() else {}


def told(out):
    return json.loads((out.parent / f"{out.name}.report.json").read_text())


@pytest.fixture(scope="module")
def checked(inputs):
    out = inputs.folder / "captions.json"
    return out, check(inputs, out)


def test_every_picture_has_an_advantage_with_its_interval(checked):
    out, content = checked
    assert told(out)["asked"] == OF_THE_BASE
    assert len(content["pictures"]) == len(DATASET)
    for item in content["pictures"]:
        assert item["advantage"]["low"] <= item["advantage"]["value"] <= item["advantage"]["high"]
        assert item["gained"] is None
    assert sum(item["held_out"] for item in content["pictures"]) == 1


def test_a_page_beside_it_shows_every_picture_with_its_interval(checked):
    out, content = checked
    page = out.with_suffix(".html").read_text()
    for item in content["pictures"]:
        assert f"{item['subset']}/{item['name']}" in page
        assert f"({item['advantage']['low']:+.1%} to {item['advantage']['high']:+.1%})" in page


def test_a_second_call_asks_nothing(inputs, checked, monkeypatch):
    monkeypatch.setattr(check_captions, "load_base", lambda *_, **__: pytest.fail("nothing is missing"))
    out = inputs.folder / "again.json"
    assert check(inputs, out) == checked[1]
    assert told(out)["asked"] == 0


def test_lost_answers_come_back_to_the_bit_and_alone(inputs, checked, tmp_path):
    folder = shutil.copytree(inputs.folder / "caches", tmp_path / "caches")
    segments = sorted((folder / ".sd3pipe/errors/segments").iterdir())
    for segment in segments[::3]:
        segment.unlink()
    out = tmp_path / "out.json"
    assert check(inputs, out, text=folder / "text", latents=folder / "latents") == checked[1]
    assert 0 < told(out)["asked"] < OF_THE_BASE


@pytest.mark.long
def test_shards_share_the_answers_out(inputs, checked, tmp_path):
    folder = shutil.copytree(inputs.folder / "caches", tmp_path / "caches")
    shutil.rmtree(folder / ".sd3pipe")
    caches = {"text": folder / "text", "latents": folder / "latents"}
    assert check(inputs, tmp_path / "a.json", shard="0/2", **caches) == {}
    assert told(tmp_path / "a.json")["left"] > 0
    assert check(inputs, tmp_path / "b.json", shard="1/2", **caches) == checked[1]


@pytest.mark.long
def test_an_adapter_adds_what_it_gained_and_asks_its_own_alone(inputs, checked, tmp_path):
    network = attach(load_mmdit(inputs.model), AdapterSpec(rank=2, seed=0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(tmp_path / "adapter.safetensors", network.deltas())
    out = tmp_path / "out.json"
    content = check(inputs, out, adapter=tmp_path / "adapter.safetensors")
    assert told(out)["asked"] == len(DATASET) * LEVELS * DRAWS
    assert all(item["learnt"] in ("not learnt", "learnt", "memorised") for item in content["pictures"])
    assert content["checkpoints"][0]["gained_by_subset"]["photos"]["low"] is not None
    assert content["checkpoints"][0]["memorised_gap"] is not None


@pytest.mark.long
def test_what_a_runs_own_losses_say_stands_beside_it(inputs, checked, tmp_path):
    run = inputs.train(tmp_path / "r", max_train_steps=8, train_batch_size=2)
    content = check(inputs, tmp_path / "out.json", adapter=run.folder)
    trained = [item for item in content["pictures"] if not item["held_out"]]
    assert all(item["in_training"]["seen"] >= 3 for item in trained)
    assert [item["in_training"] for item in content["pictures"] if item["held_out"]] == [None]
    assert "quantile of its losses in training" in (tmp_path / "out.html").read_text()
