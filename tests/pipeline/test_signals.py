"""A signal at any moment ends a command with 75, or kills it before it began; nothing is lost, and nothing is a bug."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from support.command_line import forked, sd3pipe

from sd3pipe.demo.base_files import MODEL, TOKENIZERS

COMMANDS = ("encode-text", "encode-latents", "train", "run")
STEPS = 60
SLOW_SIGNALS = 8  # for each command
LATEST_SECONDS = 8.0  # by then the third step is done


@pytest.fixture(scope="module")
def new_project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "new"
    (folder / "photos").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 90, 30)).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(f"a large red circle on a blue background, number {number}")
    (folder / "d.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'photos'\n")
    (folder / "project.toml").write_text(
        f"[paths]\nmodel = '{MODEL}'\ntokenizers = '{TOKENIZERS}'\ndataset = 'd.toml'\ncaches = 'caches'\n"
        "run = 'runs/x'\nexport = 'x.safetensors'\n"
    )
    (folder / "stages").mkdir()
    (folder / "stages" / "train.toml").write_text(
        f"max_train_steps = {STEPS}\nsave_every_n_steps = {STEPS}\nnetwork_dim = 2\n"
    )
    return folder


@pytest.fixture(scope="module")
def encoded_project(new_project) -> Path:
    folder = new_project.with_name("encoded")
    shutil.copytree(new_project, folder)
    forked("encode-text", cwd=folder)
    forked("encode-latents", cwd=folder)
    return folder


@pytest.fixture
def make_project(new_project, encoded_project, tmp_path) -> Callable[[str, str], Path]:
    """Returns what makes a project in which a command has everything to do."""

    def make(command: str, name: str = "project") -> Path:
        source = encoded_project if command == "train" else new_project
        return shutil.copytree(source, tmp_path / name)

    return make


def begin(folder: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sd3pipe", command],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def told(process: subprocess.Popen[str]) -> int:
    """Sends SIGTERM and returns how the command ends, after checking what it says."""
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "Traceback" not in said and "bug" not in said and "error:" not in said, said
    assert process.returncode in (0, 75, -signal.SIGTERM), said
    heard = "SIGTERM: stopping after what is under way" in said
    ended = "was stopped: `sd3pipe run`" in said  # what `run` had started had nothing left to do, and died of it
    assert process.returncode != 75 or heard or ended
    return process.returncode


def results(folder: Path) -> dict[str, bytes]:
    """Returns what a command was to make, of adapters the tensors alone: their metadata tells the time of training."""
    caches = [path for path in folder.glob("caches/*/**/*") if ".sd3pipe" not in path.parts and path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in caches}
    for path in (folder / "x.safetensors", folder / "runs" / "x" / "final" / "adapter.safetensors"):
        if path.exists():
            found |= {f"{path.name} {name}": tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name != "train")]
)
def test_a_signal_while_modules_are_imported_is_not_lost(make_project, command):
    folder = make_project(command)
    process = begin(folder, command)
    time.sleep(1.0)
    assert told(process) in (75, -signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_within_a_step_saves_it(make_project, steps):
    folder = make_project("train")
    process, metrics = begin(folder, "train"), folder / "runs" / "x" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"kind": "step"') < steps:
        assert process.poll() is None
        time.sleep(0.01)
    assert told(process) == 75
    done = metrics.read_text().count('"kind": "step"')
    assert (folder / "runs" / "x" / "checkpoints" / f"step-{done:08d}" / "state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_stopped_again_and_again_ends_as_one_that_never_was(make_project, command):
    whole, stopped = make_project(command, "whole"), make_project(command, "stopped")
    sd3pipe(command, cwd=whole)
    moments = random.Random(command)
    for number in range(SLOW_SIGNALS):
        process = begin(stopped, command)
        time.sleep(number and moments.uniform(0, LATEST_SECONDS))
        if told(process) == 0:  # it was finished: the others begin anew
            stopped = make_project(command, f"stopped-{number}")
    sd3pipe(command, cwd=stopped)
    assert results(stopped) == results(whole)
