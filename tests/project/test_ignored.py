"""What commands leave in a project, git ignores, but for a run's figures."""

import os
import subprocess
from pathlib import Path

import pytest
from support.command_line import forked
from support.photographs import write_photographs

from sd3pipe.cli import COMMANDS
from sd3pipe.demo.project import project_texts
from sd3pipe.params.command_line import load_model
from sd3pipe.params.fields import option_extra

ROOT = Path(__file__).resolve().parents[2]
LEFT = {  # by command, as in its documentation; what one writes under a name that the user must give is theirs
    "encode-text": ["caches/text/manifest.json", "caches/.sd3pipe/text/stat.json", "caches/text.report.json"],
    "encode-latents": ["caches/latents/segments/a.safetensors", "caches/latents/index/a.zarr/key/0"],
    "train": ["runs/NAME/final/adapter.safetensors", "runs/NAME/report.json", "runs/NAME/samples/0.png",
              "runs/NAME/metrics.jsonl", "runs/NAME.1/metrics.json", "runs/NAME.12/plots/loss.csv"],
    "export": ["exports/NAME.safetensors", "exports/NAME.safetensors.report.json"],
    "preview": ["preview/index.html", "preview/64x64.png", "preview.report.json"],
    "sample": ["sheets/grid.png", "sheets.report.json", "samples/grid.png"],
    "report": ["runs/NAME/report.html"],
    "dvc": ["dvc_plots/index.html"],
}  # fmt: skip
TRACKED = ["runs/NAME/metrics.json", "runs/NAME/plots/loss.csv"]


def untracked(folder: Path) -> list[str]:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    for command in (["init", "-q"], ["status", "--porcelain", "-z", "--untracked-files=all"]):
        done = subprocess.run(
            ["git", *command], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    return sorted(line[3:] for line in done.stdout.split("\0") if line)


def leave(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")


@pytest.mark.parametrize("name", ["cat", "v1.5", "my cat"])
def test_what_commands_leave_is_ignored(tmp_path, name):
    write_photographs(tmp_path / "my [old] photos ", ("chelsea.png",), 96)
    given = ("--model", "a/b", "--for", "sd35-large", "--images", tmp_path / "my [old] photos ", "--name", name)
    forked("init", tmp_path, *given, cwd=tmp_path)
    own = untracked(tmp_path)
    assert not [file for file in own if "photos" in file]
    leave(tmp_path, [file.replace("NAME", name) for files in LEFT.values() for file in [*files, *TRACKED]])
    assert untracked(tmp_path) == sorted([*own, *(file.replace("NAME", name) for file in TRACKED)])


def test_every_default_folder_is_known_here():
    known = {file.partition("/")[0] for files in LEFT.values() for file in files} | {"."}
    for command in COMMANDS:
        for field in load_model(command).model_fields.values():
            extra = option_extra(field)
            if extra["role"] == "path" and isinstance(field.default, str) and command != "demo":
                assert field.default in known, command


def test_the_repository_ignores_what_its_commands_leave(tmp_path):
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    leave(tmp_path, [file.replace("NAME", "demo") for files in LEFT.values() for file in [*files, *TRACKED]])
    leave(tmp_path, ["demo/before-and-after.png", "sd3pipe-demo/x.png"])
    assert untracked(tmp_path) == [".gitignore"]


def test_a_demo_leaves_nothing_to_commit(tmp_path):
    leave(tmp_path, ["before-and-after.png"])
    for name, text in project_texts(steps=1).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert untracked(tmp_path) == []
