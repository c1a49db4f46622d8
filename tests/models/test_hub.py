"""A hub id fetches the files that a component needs and no others; every way it can fail is one clear line.

The hub is a folder here: nothing touches a network.
"""

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from support.hub_answers import response
from support.tiny_parts import save_part, tiny_parts

from sd3pipe.errors import ExitCode, InputError, NetworkError, StorageError
from sd3pipe.models.hub import is_hub_id
from sd3pipe.models.sources import find_component
from sd3pipe.tensors.reader import read_tensors

REPO = "stabilityai/stable-diffusion-3.5-medium"


class FakeHub:
    """Stands for hf_hub_download: serves the files of a folder, or raises what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.revisions: set[str | None] = set()
        self.error: Exception | None = None

    def __call__(self, repo, name, *, revision=None):
        assert repo == REPO
        self.asked.append(name)
        self.revisions.add(revision)
        if self.error is not None:
            raise self.error
        if not (self.folder / name).is_file():
            raise errors.RemoteEntryNotFoundError("404 Entry Not Found", response=response(404))
        return str(self.folder / name)

    @property
    def served(self):
        return [name for name in self.asked if (self.folder / name).is_file()]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)  # so that no folder is called like an owner
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    return fake


@pytest.fixture
def parts(hub):
    parts = tiny_parts()
    for folder, stem, component in (
        ("text_encoder", "model", "clip_l"),
        ("text_encoder_2", "model.fp16", "clip_g"),
    ):
        (hub.folder / folder).mkdir(parents=True)
        save_part(hub.folder / folder / f"{stem}.safetensors", parts[component])
    t5 = hub.folder / "text_encoder_3"
    t5.mkdir()
    keys = list(parts["t5xxl"])
    shards = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, shard in shards.items():
        save_part(t5 / name, {key: parts["t5xxl"][key] for key in shard})
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    (t5 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts


@pytest.mark.parametrize(
    "component, files",
    [
        ("clip_l", ["text_encoder/model.safetensors"]),
        ("clip_g", ["text_encoder_2/model.fp16.safetensors"]),
        (
            "t5xxl",
            [
                "text_encoder_3/model.safetensors.index.json",
                "text_encoder_3/model-00001-of-00002.safetensors",
                "text_encoder_3/model-00002-of-00002.safetensors",
            ],
        ),
    ],
)
def test_only_the_files_of_the_component_are_fetched(hub, parts, component, files):
    found = read_tensors(find_component(component, model=REPO).tensors, dtype=None)
    assert found.keys() == parts[component].keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in parts[component].items())
    assert sorted(hub.served) == sorted(files)


def test_revision_after_an_at_sign_is_asked_for(hub, parts):
    find_component("clip_l", model=f"{REPO}@v1.0")
    assert hub.revisions == {"v1.0"}


def test_repository_without_the_component_is_an_input_error(hub, parts):
    with pytest.raises(InputError, match=f"{REPO}: this hub repository has no vae/"):
        find_component("vae", model=REPO)


def _network_error(hub, error):
    hub.error = error
    with pytest.raises(NetworkError) as caught:
        find_component("vae", model=REPO)
    message = str(caught.value)
    assert "\n" not in message and REPO in message
    assert caught.value.exit_code == ExitCode.NETWORK
    return message


@pytest.mark.parametrize(
    "error",
    [
        errors.GatedRepoError("403 Forbidden.\nAccess to this model is restricted", response=response(403)),
        errors.HfHubHTTPError("401 Unauthorized", response=response(401)),
        errors.HfHubHTTPError("403 Forbidden", response=response(403)),
    ],
    ids=["gated", "401", "403"],
)
def test_gated_repository_names_the_licence_page_and_the_login_command(hub, error):
    message = _network_error(hub, error)
    assert f"https://huggingface.co/{REPO}" in message and "hf auth login" in message


def test_missing_repository_is_named(hub):
    error = errors.RepositoryNotFoundError("404 Client Error.\nRepository Not Found", response=response(404))
    assert "no such repository" in _network_error(hub, error)


def test_missing_revision_is_named(hub):
    error = errors.RevisionNotFoundError("404", response=response(404))
    assert "no revision" in _network_error(hub, error)


def test_offline_says_what_is_missing_and_the_way_out(hub):
    offline = errors.LocalEntryNotFoundError("not in the cache")
    offline.__cause__ = ConnectionError("Name or service not known\nmore")
    message = _network_error(hub, offline)
    assert "VAE is not in the local hub cache" in message and "Name or service not known" in message
    assert "local file or folder" in message


def test_offline_mode_uses_what_the_cache_has(hub, parts, monkeypatch):
    """Offline, an unsharded component's missing index looks like any file that is not cached."""

    def cached_only(repo, name, *, revision=None):
        if not (hub.folder / name).is_file():
            raise errors.LocalEntryNotFoundError("offline and not in the cache")
        return str(hub.folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached_only)
    assert find_component("clip_l", model=REPO).tensors.keys() == parts["clip_l"].keys()


def test_real_huggingface_hub_offline_gives_the_network_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NetworkError, match="not in the local hub cache"):
        find_component("vae", model="nobody/nothing-there")


def test_server_error_names_the_status(hub):
    assert "answered 503" in _network_error(hub, errors.HfHubHTTPError("503", response=response(503)))


def test_broken_connection_is_a_network_error(hub):
    assert "could not be fetched" in _network_error(hub, ConnectionResetError(errno.ECONNRESET, "reset by peer"))


def test_full_disk_is_a_storage_error(hub):
    hub.error = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    with pytest.raises(StorageError, match="the disk is full"):
        find_component("vae", model=REPO)


def test_what_counts_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_id("stabilityai/stable-diffusion-3.5-large")
    assert is_hub_id("owner/name@main")
    for text in (
        "name",
        "a/b/c",
        "./a/b",
        "../b",
        "/a/b",
        "~/b",
        "a/b.safetensors",
        "a/b.ckpt",
        "models/b",
        "a//b",
        "",
    ):
        assert not is_hub_id(text), text
