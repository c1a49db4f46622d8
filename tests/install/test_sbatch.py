"""The script for Slurm trains in pieces, and asks for the next one: by the clock, and when Slurm takes the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import sd3pipe
from support.documented import ROOT

from sd3pipe.demo.base_files import MODEL, TOKENIZERS

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
STEPS = 400


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slurm") / "project"
    (folder / "photos").mkdir(parents=True)
    Image.new("RGB", (64, 64), (200, 90, 30)).save(folder / "photos" / "a.png")
    (folder / "photos" / "a.txt").write_text("a red circle")
    (folder / "d.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'photos'\n")
    (folder / "project.toml").write_text(
        f"[paths]\nmodel = '{MODEL}'\ntokenizers = '{TOKENIZERS}'\ndataset = 'd.toml'\ncaches = 'caches'\n"
        "run = 'runs/x'\nexport = 'x.safetensors'\n"
    )
    (folder / "stages").mkdir()
    (folder / "stages" / "train.toml").write_text(f"max_train_steps = {STEPS}\nnetwork_dim = 2\n")
    sd3pipe("run", "encode-text", "encode-latents", cwd=folder)
    return folder


def submit(project: Path, folder: Path, limit: str) -> subprocess.Popen[str]:
    """Starts the script as Slurm does: a copy of it, from wherever; `scontrol` writes down what it is asked for."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
    (folder / "scontrol").chmod(0o755)
    variables = {
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "17", "LIMIT": limit, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    copy = folder / "slurm_script"
    copy.write_bytes(SCRIPT.read_bytes())
    return subprocess.Popen(["bash", str(copy)], cwd=folder, env={**os.environ, **variables}, text=True)


def asked(folder: Path) -> str:
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


def steps_done(project: Path) -> int:
    return len((project / "runs/x/metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Slurm's scripts are for a Linux shell")
def test_each_piece_asks_for_the_next_and_the_last_one_exports(project, tmp_path):
    by_the_clock = submit(project, tmp_path, "1s")
    assert by_the_clock.wait(600) == 75 and asked(tmp_path) == "requeue 17\n"
    taken = submit(project, tmp_path, "1h")
    before = steps_done(project)
    while steps_done(project) <= before:
        time.sleep(0.1)
    taken.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM@300 says
    assert taken.wait(600) == 75 and asked(tmp_path) == "requeue 17\n" * 2
    newest = max((project / "runs/x/checkpoints").glob("step-*/state.json"))
    state = json.loads(newest.read_text())
    assert 0 < state["step"] < STEPS
    assert submit(project, tmp_path, "1h").wait(600) == 0
    assert (project / "x.safetensors").is_file() and asked(tmp_path) == "requeue 17\n" * 2
