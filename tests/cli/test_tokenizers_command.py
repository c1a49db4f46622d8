"""`sd3pipe tokenizers DIR`, offline: from a local hub cache, or with one clear line."""

import shutil

import pytest
from support.command_line import sd3pipe

from sd3pipe.models.tokenizer_folders import HUB_REPOSITORIES, find_tokenizers, tokenizers_identity


@pytest.fixture
def hub(tmp_path, shared_dir):
    """A hub cache that holds the three tokenizers, as huggingface_hub lays it out."""
    for encoder, repository in HUB_REPOSITORIES.items():
        home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(shared_dir / "tokenizers" / encoder, home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.long
def test_tokenizers_are_copied_from_the_hub_cache(hub, tmp_path, shared_dir):
    done = sd3pipe("tokenizers", tmp_path / "t", env=hub)
    assert f"--tokenizers {tmp_path / 't'}" in done.stdout
    expected = tokenizers_identity(find_tokenizers(folder=shared_dir / "tokenizers"))
    assert tokenizers_identity(find_tokenizers(folder=tmp_path / "t")) == expected
    again = sd3pipe("tokenizers", tmp_path / "t", env={"HF_HUB_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"})
    assert again.stderr.count("is there already") == 3


@pytest.mark.long
def test_without_network_and_cache_there_is_one_line(tmp_path):
    env = {"HF_HUB_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    done = sd3pipe("tokenizers", tmp_path / "t", expect=6, env=env)
    (line,) = done.stderr.strip().splitlines()
    assert "openai/clip-vit-large-patch14" in line
    assert "cannot be reached" in line


@pytest.mark.long
def test_foreign_files_in_the_folder_are_refused(hub, tmp_path, shared_dir):
    shutil.copytree(shared_dir / "tokenizers", tmp_path / "t")
    merges = tmp_path / "t" / "clip_g" / "merges.txt"
    merges.chmod(0o644)
    merges.write_text(merges.read_text(encoding="utf-8").rsplit("\n", 3)[0] + "\n", encoding="utf-8")
    done = sd3pipe("tokenizers", tmp_path / "t", expect=3, env=hub)
    assert str(tmp_path / "t" / "clip_g") in done.stderr.splitlines()[-1]
