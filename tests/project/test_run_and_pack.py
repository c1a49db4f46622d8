"""`run` knows the order and the paths of a project; `pack` lists what a training machine needs."""

import pytest
from support.command_line import sd3pipe

from sd3pipe.commands.run import stage_arguments
from sd3pipe.config import read_project
from sd3pipe.errors import ParameterError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "project.toml").write_text(
        '[paths]\nmodel = "m.safetensors"\nt5xxl = "t5.safetensors"\ndataset = "dataset.toml"\n'
        'sample_prompts = "prompts.txt"\ncaches = "caches"\nrun = "runs/cat"\nexport = "exports/cat.safetensors"\n'
        'loras_dir = "loras"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_stages_stand_in_order_with_their_paths(folder):
    stages = stage_arguments(read_project(folder))
    assert list(stages) == ["encode-text", "encode-prompts", "encode-latents", "train", "export"]
    assert stages["encode-text"] == [
        "encode-text", "--model", "m.safetensors", "--t5xxl", "t5.safetensors",
        "--dataset", "dataset.toml", "--out", "caches/text",
    ]  # fmt: skip
    assert stages["encode-prompts"][-4:] == ["--sample-prompts", "prompts.txt", "--out", "caches/prompts"]
    assert stages["train"][-4:] == ["--out", "runs/cat", "--loras-dir", "loras"]
    assert stages["export"][1:3] == ["--adapter", "runs/cat"]


def test_a_project_without_prompts_has_no_prompt_stage(folder):
    file = folder / "project.toml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "prompts" not in line))
    stages = stage_arguments(read_project(folder))
    assert "encode-prompts" not in stages
    assert "--prompts" not in stages["train"]


def test_missing_paths_are_all_named(folder):
    (folder / "project.toml").write_text('[paths]\nmodel = "m"\n')
    with pytest.raises(ParameterError) as caught:
        stage_arguments(read_project(folder))
    assert str(caught.value).count("is missing") == 4


def test_dry_run_prints_the_commands_and_runs_none(folder):
    done = sd3pipe("run", "--dry-run", cwd=folder)
    assert [line.split()[2] for line in done.stdout.splitlines()] == [
        "encode-text", "encode-text", "encode-latents", "train", "export",
    ]  # fmt: skip
    assert not (folder / "caches").exists()


def test_wanted_stages_run_alone(folder):
    done = sd3pipe("run", "--dry-run", "train", "export", cwd=folder)
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["train", "export"]


def test_a_stage_that_fails_gives_its_exit_code(folder):
    done = sd3pipe("run", cwd=folder, expect=2)
    assert "dataset.toml: there is no such file" in done.stderr
    assert "encode-text ended with exit code 2" in done.stderr


def test_no_project_is_told(tmp_path):
    assert "sd3pipe init" in sd3pipe("run", cwd=tmp_path, expect=2).stderr


def test_pack_lists_caches_and_parameters(folder):
    for name in ("text", "latents"):
        (folder / "caches" / name / "segments").mkdir(parents=True)
        (folder / "caches" / name / "manifest.json").write_text("{}")
        (folder / "caches" / name / "segments" / "a.safetensors").write_bytes(bytes(2000))
    (folder / "stages").mkdir()
    (folder / "stages" / "train.toml").write_text("")
    names = sd3pipe("pack", "--list-only", cwd=folder).stdout.split()
    assert names == [
        "project.toml", "stages/train.toml",
        "caches/text/manifest.json", "caches/text/segments/a.safetensors",
        "caches/latents/manifest.json", "caches/latents/segments/a.safetensors",
    ]  # fmt: skip
    assert "6 files, 4." in sd3pipe("pack", cwd=folder).stdout


def test_pack_shows_the_ten_largest_and_all_on_demand(folder):
    for name in ("text", "latents"):
        (folder / "caches" / name / "segments").mkdir(parents=True)
        (folder / "caches" / name / "manifest.json").write_text("{}")
        for number in range(8):
            (folder / "caches" / name / "segments" / f"{number}.safetensors").write_bytes(bytes(1000 * number))
    lines = sd3pipe("pack", cwd=folder).stdout.splitlines()
    assert lines[0] == "the 10 largest of 19 files (--all lists them all):"
    assert [line.split()[0] for line in lines[1:11]] == [str(number) for number in (7, 7, 6, 6, 5, 5, 4, 4, 3, 3)]
    assert lines[11].startswith("19 files, 56.")
    assert len(sd3pipe("pack", "--all", cwd=folder).stdout.splitlines()) == 19 + 2


def test_pack_asks_for_the_caches_first(folder):
    assert "encode" in sd3pipe("pack", cwd=folder, expect=3).stderr
