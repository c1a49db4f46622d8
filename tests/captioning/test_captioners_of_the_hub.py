"""A captioner behind a hub id: its files and no others are fetched, and every failure is one line of the network's."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import errors
from support.hub_answers import response

from sd3pipe.captioning.captioner import find_captioner
from sd3pipe.errors import InputError, NetworkError
from sd3pipe.file_stamps import FileStamps

VLM, TAGGER = "Salesforce/blip", "SmilingWolf/wd-tagger"


class FakeHub:
    """Stands for huggingface_hub: serves the files of OWNER/NAME below a folder, or raises what it is told to."""

    def __init__(self, served: Path, cache: Path) -> None:
        self.served, self.cache = served, cache
        self.error: Exception | None = None

    def put(self, repo: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            file = self.served / repo / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def hf_hub_download(self, repo, name, *, revision=None):
        if self.error is not None:
            raise self.error
        if not (self.served / repo / name).is_file():
            raise errors.RemoteEntryNotFoundError("404 Entry Not Found", response=response(404))
        return str(self._fetched(repo, name))

    def snapshot_download(self, repo, *, revision=None, allow_patterns):
        if self.error is not None:
            raise self.error
        names = [str(file.relative_to(self.served / repo)) for file in (self.served / repo).rglob("*.*")]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self._fetched(repo, name)
        return str(self.cache / repo)

    def _fetched(self, repo: str, name: str) -> Path:
        there = self.cache / repo / name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.served / repo / name, there)
        return there


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "served", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # so that no folder is called like an owner
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    config = {"config.json": json.dumps({"model_type": "blip"}), "tokenizer.json": "{}", "vocab.txt": "a"}
    others = {"pytorch_model.bin": "pickle", "tf_model.h5": "weights", "README.md": "words", "picture.png": "pixels"}
    fake.put(VLM, {**config, **others, "model.safetensors": "weights"})
    fake.put(TAGGER, {"model.onnx": "network", "selected_tags.csv": "name,category", "model.safetensors": "weights"})
    return fake


def fetched(hub: FakeHub, repo: str) -> set[str]:
    return {file.name for file in (hub.cache / repo).iterdir()}


def test_an_image_text_model_comes_without_weights_of_other_kinds(hub, tmp_path):
    captioner = find_captioner(VLM)
    assert (captioner.kind, captioner.model_type) == ("vlm", "blip")
    assert fetched(hub, VLM) == {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors"}
    here = find_captioner(str(hub.cache / VLM))
    stamps = FileStamps(tmp_path / "stat.json")
    assert captioner.fingerprint(stamps) == here.fingerprint(stamps)


def test_of_a_tagger_come_network_and_tags(hub):
    assert find_captioner(TAGGER).kind == "tagger"
    assert fetched(hub, TAGGER) == {"model.onnx", "selected_tags.csv"}


def test_a_repository_of_something_else_is_refused(hub):
    with pytest.raises(InputError, match=f"{VLM}: a tagger's repository has model.onnx and selected_tags.csv"):
        find_captioner(VLM, "tagger")
    hub.put("someone/else", {"README.md": "words"})
    with pytest.raises(InputError, match="someone/else: holds no captioner"):
        find_captioner("someone/else")


@pytest.mark.parametrize(
    "error, said",
    [
        (errors.GatedRepoError("403", response=response(403)), "is gated: accept its licence"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "the hub has no such repository"),
        (errors.HfHubHTTPError("503", response=response(503)), "the hub answered 503"),
        (errors.LocalEntryNotFoundError("no connection"), "its model is not in the local hub cache"),
        (ConnectionResetError("reset by peer"), "could not be fetched"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, error, said):
    hub.error = error
    for kind in (None, "vlm"):
        with pytest.raises(NetworkError, match=said) as caught:
            find_captioner(VLM, kind)
        assert VLM in str(caught.value) and "\n" not in str(caught.value)
