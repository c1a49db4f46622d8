"""What is said to lie ahead: memory against the card, where there is one."""

from pathlib import Path

import pytest

from sd3pipe.config import Project
from sd3pipe.demo.base_files import MODEL
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
