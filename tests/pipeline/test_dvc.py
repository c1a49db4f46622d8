"""The pipeline under the real dvc and git: what each kind of change makes run, counted from the stages' reports."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.command_line import report_of, sd3pipe
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
    "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull,
}  # fmt: skip


class Project:
    """A project folder under git and dvc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**ENVIRONMENT, **(env or {})},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def repro(self, *more: str) -> set[str]:
        """Runs `dvc repro` and returns the stages whose commands ran."""
        shown = self.call("dvc", "repro", *more)
        return {line.split("'")[1] for line in shown.splitlines() if line.startswith("Running stage")}

    def hashes(self) -> dict[str, str]:
        """Returns the hash of every out in dvc.lock."""
        lock = yaml.safe_load((self.folder / "dvc.lock").read_text())
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}

    def encoded(self, cache: str) -> int:
        return report_of(self.folder / "caches" / cache)["encoded"]

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new))


def make_project(folder: Path, base_folder: Path) -> Project:
    base = write_tiny_base(base_folder, variant="sd35-medium", layout="single")
    return start_project(folder, "--model", base.model, "--tokenizers", base.tokenizers)


def make_project_of_parts(folder: Path) -> Project:
    """Makes a project with MMDiT, VAE and text encoders in files of their own, in its folder models/."""
    base = write_tiny_base(folder / "models", variant="sd35-medium", layout="separate")
    tensors = load_file(base.model)
    for name in ("mmdit", "vae"):
        chosen = {key: tensor for key, tensor in tensors.items() if key.startswith("first_stage") == (name == "vae")}
        save_file(chosen, folder / "models" / f"{name}.safetensors")
    base.model.unlink()
    return start_project(
        folder, "--model", "models/mmdit.safetensors", "--vae", "models/vae.safetensors",
        "--tokenizers", "models/tokenizers",
    )  # fmt: skip


def start_project(folder: Path, *options: object) -> Project:
    images = write_photographs(folder / "images", ("chelsea.png", "coffee.png", "rocket.jpg"), 96)
    sd3pipe("init", folder, "--images", images, "--resolution", 64, "--name", "photos", *options, cwd=folder)
    (folder / "sample_prompts.txt").write_text("a cat --w 64 --h 64 --d 1 --s 2\n")
    project = Project(folder)
    stage = folder / "stages" / "train.toml"
    text = stage.read_text().replace("max_train_steps = 2000", "max_train_steps = 3")
    stage.write_text(text.replace("network_dim = 16", "network_dim = 2") + "\nthreads = 1\n")
    for encode in ("encode_text", "encode_latents"):
        with open(folder / "stages" / f"{encode}.toml", "a") as file:
            file.write("\nthreads = 1\n")
    project.call("git", "init", "-q")
    project.call("dvc", "init", "-q")
    project.call("git", "add", "-A", ".")
    project.call("git", "commit", "-qm", "start")
    return project


def test_each_change_runs_what_it_must_and_nothing_else(tmp_path):
    project = make_project(tmp_path / "project", tmp_path / "base")

    assert project.repro() == {"encode_text", "encode_latents", "train", "export"}
    first = project.hashes()
    assert (project.encoded("text"), project.encoded("latents"), project.encoded("prompts")) == (4, 3, 2)
    assert (project.folder / "exports" / "photos.safetensors").is_file()
    assert list((project.folder / "runs" / "photos" / "samples").rglob("*.png"))

    assert project.repro() == set()

    again = make_project(tmp_path / "again", tmp_path / "base")
    again.repro()
    assert again.hashes() == first

    caption = project.folder / "images" / "coffee.txt"
    before = caption.read_text()
    caption.write_text("another caption\n")
    assert project.repro() == {"encode_text", "encode_latents", "train", "export"}
    assert (project.encoded("text"), project.encoded("latents")) == (1, 0)
    assert project.hashes()["caches/text"] != first["caches/text"]
    assert project.hashes()["caches/latents"] == first["caches/latents"]

    caption.write_text(before)
    shown = project.call("dvc", "repro")
    assert project.encoded("text") == 0
    assert "Stage 'train' is cached" in shown and "Running stage 'train'" not in shown
    assert project.hashes() == first

    project.edit("sample_prompts.txt", "a cat", "a dog --w 64 --h 64 --d 2 --s 2\na cat")
    assert "train" not in project.repro()
    assert project.encoded("prompts") == 1

    project.edit("stages/train.toml", "# Commented lines", "# These lines")
    assert project.repro() == set()

    project.edit("stages/train.toml", "learning_rate = 0.0001", "learning_rate = 0.001")
    assert project.repro() == {"train", "export"}
    assert "learning_rate" in project.call("dvc", "params", "diff")

    write_photographs(project.folder / "images", ("astronaut.png",), 96)
    assert project.repro() == {"encode_text", "encode_latents", "train", "export"}
    assert (project.encoded("text"), project.encoded("latents")) == (1, 1)

    assert "loss_last" in project.call("dvc", "metrics", "show")
    project.call("dvc", "plots", "show")
    assert (project.folder / "dvc_plots" / "index.html").is_file()

    project.call("git", "add", "-A", ".")
    project.call("git", "commit", "-qm", "more")
    project.call("dvc", "exp", "run", "-S", "stages/train.toml:network_dim=3")
    report = json.loads((project.folder / "runs" / "photos" / "report.json").read_text())
    assert report["options"]["network_dim"] == 3


WITNESS = """
import atexit, json, os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(os.path.abspath(os.fsdecode(args[0])))
                 if event == "open" and isinstance(args[0], (str, bytes)) else None)
def tell():
    told = {"argv": sys.argv, "modules": sorted(sys.modules), "opened": opened}
    with open(os.path.join(os.environ["WITNESS"], f"{os.getpid()}.json"), "w") as file:
        json.dump(told, file)
atexit.register(tell)
"""


def test_second_machine_trains_the_same_adapter_without_pictures_or_encoders(tmp_path):
    """A encodes and pushes; B, a clone with the MMDiT alone, pulls and trains: equal bits on the CPU."""
    a = make_project_of_parts(tmp_path / "a")
    a.call("dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"))
    a.repro("encode_text", "encode_latents")
    a.call("git", "add", "-A", ".")
    a.call("git", "commit", "-qm", "encoded")
    a.call("dvc", "push", "encode_text", "encode_latents")
    a.call("git", "clone", "-q", str(a.folder), str(tmp_path / "b"))
    assert a.repro() == {"train", "export"}

    b = Project(tmp_path / "b")
    assert not (b.folder / "images").exists() and not list(b.folder.rglob("*.safetensors"))
    (b.folder / "models").mkdir(exist_ok=True)
    shutil.copyfile(a.folder / "models" / "mmdit.safetensors", b.folder / "models" / "mmdit.safetensors")
    shutil.rmtree(b.folder / "models" / "tokenizers", ignore_errors=True)
    a.folder = a.folder.rename(tmp_path / "a-gone")
    witness = tmp_path / "witness"
    witness.mkdir()
    (witness / "sitecustomize.py").write_text(WITNESS)
    paths = os.pathsep.join(filter(None, [str(witness), os.environ.get("PYTHONPATH")]))
    shown = b.call(
        "dvc", "repro", "--pull", "--allow-missing", "train", env={"WITNESS": str(witness), "PYTHONPATH": paths}
    )
    assert [line for line in shown.splitlines() if line.startswith("Running stage")] == ["Running stage 'train':"]
    assert b.hashes()["runs/photos/final"] == a.hashes()["runs/photos/final"]

    told = [json.loads(file.read_text()) for file in witness.glob("*.json")]
    (train,) = [process for process in told if process["argv"][1:2] == ["train"]]
    assert not {"transformers", "tokenizers", "PIL", "diffusers", "peft"} & set(train["modules"])
    assert any(name.startswith(str(b.folder / "caches")) for name in train["opened"])
    assert not [name for name in train["opened"] if name.startswith((str(tmp_path / "a"), str(tmp_path / "remote")))]


def test_a_killed_repro_goes_on(tmp_path):
    project = make_project(tmp_path / "project", tmp_path / "base")
    running = subprocess.Popen(
        ["dvc", "repro"], cwd=project.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("Running stage 'train'"):
            break
    os.killpg(running.pid, 9)
    running.wait()
    for lock in (project.folder / ".dvc" / "tmp").glob("*lock*"):
        lock.unlink() if lock.is_file() else None
    assert project.repro() >= {"train", "export"}
    assert project.repro() == set()
