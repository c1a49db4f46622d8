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
    ways = [(line["way"], line["base_format"], line["blocks_to_swap"]) for line in lines]
    assert ways == [
        *[("one-way", "dense", count) for count in (0, 5, 2)],
        *[("two-way", "dense", count) for count in (3, 2)],
        *[("one-way", "fp8", count) for count in (0, 5, 2)],
    ]
    assert not any("left_out" in line for line in lines)
    copied = [line["copied_bytes"] for line in lines]
    assert copied[1] > copied[6] > 0  # fp8 is smaller
    assert copied[3] > 2 * copied[1]  # two ways, and whole blocks
    assert copied[0] == copied[5] == 0
    assert len(done.stdout.splitlines()) == len(lines) + 1
