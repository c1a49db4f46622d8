"""The benchmark for GPUs runs to its end without one, at tiny sizes, so that it does not rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_streaming.py"
PEER = """
class ModelOffloader:
    def __init__(self, block_type, blocks, num_blocks, blocks_to_swap, supports_backward, device, debug=False):
        assert (num_blocks, supports_backward) == (5, True)
        self.calls = []

    def prepare_block_devices_before_forward(self, blocks):
        self.calls.append("prepare")

    def wait_for_block(self, index):
        self.calls.append(("wait", index))

    def submit_move_blocks_forward(self, blocks, index):
        assert self.calls[0] == "prepare" and self.calls[-1] == ("wait", index)
"""


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


@pytest.mark.slow
def test_a_case_with_a_peers_class_runs(tmp_path):
    place = tmp_path / "peer" / "src" / "musubi_tuner" / "modules"
    place.mkdir(parents=True)
    (place / "custom_offloading_utils.py").write_text(PEER, encoding="utf-8")
    case = {"model": "sd35-large", "base_format": "dense", "blocks_to_swap": 2, "pixels": 64, "batch": 1}
    case |= {"text_tokens": 8, "peer": f"{tmp_path / 'peer'}:ModelOffloader"}
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["seconds_per_step"] > 0


@pytest.mark.slow
def test_the_queue_for_a_card_writes_each_row_and_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, BENCHMARKS / "card.py", "--device", "cpu", "--tiny", "--results", tmp_path]
    first = subprocess.run([*command, "--rows", "2"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    (file,) = tmp_path.glob("*-card-cpu.json")
    rows = json.loads(file.read_text())["rows"]
    tests, step = rows.values()
    assert tests["exit_code"] in (0, 5)  # nothing is run without a card
    assert step["seconds_per_step"] > 0
    assert step["over_roofline"] > 0
    started = step["row_seconds"]
    again = subprocess.run([*command, "--rows", "2"], capture_output=True, text=True, check=False)
    assert json.loads(file.read_text())["rows"]["sd35-large, batch 1, 0 streamed, kept: all"]["row_seconds"] == started
    assert "predicted" in again.stdout
