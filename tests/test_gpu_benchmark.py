"""The benchmark for GPUs runs to its end without one, at tiny sizes, so that it does not rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_streaming.py"


@pytest.mark.slow
def test_gpu_streaming_runs_on_the_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--results", tmp_path, "--batches", "1"]
    done = subprocess.run(
        [*command, "--models", "sd35-medium", "--formats", "dense", "fp8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    lines = json.loads(file.read_text())["lines"]
    built = [(line["base_format"], line["blocks_to_swap"]) for line in lines]
    assert built == [("dense", 0), ("dense", 5), ("dense", 2), ("fp8", 0), ("fp8", 5), ("fp8", 2)]
    assert not any("left_out" in line for line in lines)
    copied = [line["copied_bytes"] for line in lines]
    assert copied[1] > copied[4] > 0  # fp8 is smaller
    assert copied[0] == copied[3] == 0
    assert len(done.stdout.splitlines()) == len(lines) + 1
