"""What is said to lie ahead: memory against the card, where there is one, and the disk that text takes."""

from pathlib import Path

import pytest

from sd3pipe.config import Project
from sd3pipe.console import readable_bytes
from sd3pipe.demo.base_files import MODEL
from sd3pipe.models.text_encoder_files import TextSizes
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.train import TrainParams
from sd3pipe.project import ahead as module
from sd3pipe.project.ahead import ahead

ROOT = Path(__file__).resolve().parents[2]
PROJECT = Project(folder=ROOT, paths={"dataset": str(ROOT / "examples" / "demo" / "dataset.toml")})
PATHS = {"model": str(MODEL), "text": Path("text"), "latents": Path("latents"), "out": Path("run")}


@pytest.mark.parametrize(
    ("card", "options", "said"),
    [
        (24 * 10**9, {}, "of the card's 24 GB"),
        (10**6, {"blocks_to_swap": 0}, "`sd3pipe plan --vram 0GB` looks for settings that fit"),
        (24 * 10**9, {"device": "cpu"}, None),
        (None, {}, None),
    ],
)
def test_memory_is_told_where_there_is_a_card(monkeypatch, card, options, said):
    monkeypatch.setattr(module, "card_bytes", lambda: card)
    facts = ahead(TrainParams(**PATHS, **options), PROJECT).facts
    assert any(said in fact for fact in facts) if said else not any("card" in fact for fact in facts)


def test_a_machine_without_the_dataset_tells_the_steps_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "card_bytes", lambda: 24 * 10**9)
    there = Project(folder=tmp_path, paths={"dataset": str(tmp_path / "dataset.toml")})
    assert ahead(TrainParams(**PATHS), there).facts == ["2,000 steps"]


def test_epochs_are_told_as_such():
    assert ahead(TrainParams(**PATHS, max_train_epochs=3), PROJECT).facts[0] == "3 epochs"


def test_memory_is_told_for_as_many_t5_tokens_as_encode_text_makes(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "card_bytes", lambda: 24 * 10**9)
    project = Project(folder=tmp_path, paths=PROJECT.paths)
    (tmp_path / "stages").mkdir()
    told = []
    for tokens in (10, 512):
        (tmp_path / "stages/encode_text.toml").write_text(f"t5xxl_max_token_length = {tokens}\n")
        told.append(ahead(TrainParams(**PATHS), project).facts)
    assert told[0] != told[1]


def test_whole_lokr_factors_take_the_disk_that_they_have(monkeypatch):
    """A rank that no layer has asks for them; network_args says how large they are."""
    lokr = {**PATHS, "adapter_type": "lokr", "network_dim": 100_000}
    of_factor = [
        ahead(TrainParams(**lokr, network_args=(f"lokr_factor={factor}",)), PROJECT).disk_bytes for factor in (2, 8)
    ]
    full = ahead(TrainParams(**PATHS, adapter_type="lora", network_dim=128), PROJECT).disk_bytes
    assert of_factor[1] < of_factor[0] < full


PUBLISHED = "stabilityai/stable-diffusion-3.5-large"  # asked for nothing: the published sizes are known


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, 'text takes 483 GB; t5xxl_row_dtype = "int8" makes it 280 GB, and t5_pad_to = 77, too, about 129 GB'),
        ({"t5_pad_to": 77}, 'text takes 190 GB; t5xxl_row_dtype = "int8" makes it 129 GB'),
        ({"t5xxl_row_dtype": "int8"}, None),
    ],
)
def test_much_text_is_told_with_how_it_would_be_less(monkeypatch, tmp_path, options, advice):
    monkeypatch.setattr(module, "known_texts", lambda *_, **__: (set(map(str, range(200_000))), 0))
    params = EncodeTextParams(model=PUBLISHED, dataset=tmp_path / "dataset.toml", out=tmp_path / "text", **options)
    found = ahead(params, PROJECT)
    assert (found.advice or "").removesuffix(" (docs/memory.md)") == (advice or "")
    assert found.facts[1].startswith("at most ")


def test_captions_longer_than_the_padding_and_what_lies_beside_the_cache_are_counted(monkeypatch, tmp_path):
    """Characters bound the tokens: 75 of them may be 77 with word mark and end; what is drawn may be of any length."""
    long, short = "x" * 200, "x" * 75
    monkeypatch.setattr(module, "known_texts", lambda *_, **__: ({"", short, long}, 2))
    params = EncodeTextParams(model=PUBLISHED, dataset=tmp_path / "dataset.toml", out=tmp_path / "text", t5_pad_to=77)
    sizes, clips = TextSizes(), 5 * (78 * 2048 * 2 + 2 * 77)
    rows = sum(sizes.row_bytes(tokens, "bfloat16") for tokens in (77, 77, 202, 256, 256))
    found = ahead(params, PROJECT)
    assert found.facts == ["5 captions", f"at most {readable_bytes(rows)}"]
    assert found.disk_bytes == rows + clips


def test_prompts_are_counted_as_the_texts_that_they_are(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --n dark\na dog --n dark\n")
    params = EncodeTextParams(
        model=PUBLISHED, sample_prompts=tmp_path / "prompts.txt", out=tmp_path / "prompts", t5_pad_to=77
    )
    rows = 4 * TextSizes().row_bytes(77, "bfloat16")  # the negative once, and the empty one
    assert ahead(params, PROJECT).facts == ["2 prompts", f"at most {readable_bytes(rows)}"]


def test_little_text_is_told_without_advice(tmp_path):
    params = EncodeTextParams(model=PUBLISHED, dataset=PROJECT.paths["dataset"], out=tmp_path / "text")
    assert ahead(params, PROJECT).advice is None
