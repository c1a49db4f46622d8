"""What the way in which OpenMP's threads wait for each other costs, on a machine with free cores and on a busy one.

    python benchmarks/threads.py [--steps 60] [--rounds 3] [--loops 2]

Trains the demo's base on two cached pictures, in a process of its own for each setting, in turns: torch's own way, a
bounded spin of 1,000 and of 10,000 rounds, OMP_WAIT_POLICY=PASSIVE, and one thread. Prints the median seconds per step
that the run's report tells, first beside nothing, then beside `--loops` endless loops.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "sd3pipe" / "demo" / "base"
MODEL = BASE / "demo-base.safetensors"
PROGRAM = (sys.executable, "-m", "sd3pipe")
# GOMP_SPINCOUNT is given where torch's own way is wanted, too, for sd3pipe bounds it by itself; 30 billion is libgomp's
# own count under OMP_WAIT_POLICY=ACTIVE, 300,000 where nothing is set.
SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "1,000 rounds": {"GOMP_SPINCOUNT": "1000"},
    "10,000 rounds": {"GOMP_SPINCOUNT": "10000"},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_caches(folder)
        for loops in (0, options.loops):
            with busy(loops):
                print(f"beside {loops} busy loops, load average {os.getloadavg()[0]:.1f}")
                seconds = {setting: [] for setting in SETTINGS}
                for _ in range(options.rounds):
                    for setting, environment in SETTINGS.items():
                        seconds[setting].append(seconds_per_step(folder, environment, options.steps))
            for setting, measured in seconds.items():
                print(f"  {setting:<14} {1000 * statistics.median(measured):8.1f} ms per step")


def make_caches(folder: Path) -> None:
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 90, 30)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a large red circle, number {number}")
    dataset = folder / "dataset.toml"
    dataset.write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "pictures"\n')
    common = ["--model", MODEL, "--dataset", dataset]
    for command, extra in (("encode-text", ["--tokenizers", BASE / "tokenizers"]), ("encode-latents", [])):
        out = folder / command
        subprocess.run([*PROGRAM, command, *common, *extra, "--out", out], check=True, capture_output=True, cwd=folder)


def seconds_per_step(folder: Path, environment: dict[str, str], steps: int) -> float:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    caches = ["--text", folder / "encode-text", "--latents", folder / "encode-latents"]
    run = ["--out", folder / "run", "--resume", "never", "--max-train-steps", str(steps), "--network-dim", "4"]
    subprocess.run(
        [*PROGRAM, "train", "--model", MODEL, *caches, *run],
        check=True, capture_output=True, cwd=folder, env=kept | environment,
    )  # fmt: skip
    return json.loads((folder / "run" / "report.json").read_text())["seconds_per_step"]


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
