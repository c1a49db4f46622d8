"""What the studio takes: 20 watchers of a run at 10 steps a second, a page of 20,000 steps, 2,000 pictures, and rest.

python benchmarks/studio_load.py [--seconds 60]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.studios import write_project

STEPS_PER_SECOND, WATCHERS, LONG, PICTURES, FIRST_SCREEN = 10, 20, 20_000, 2_000, 15


def line(step: int) -> str:
    numbers = {"loss": 1 / (step + 1), "loss_mean": 0.5, "learning_rate": 1e-4, "seconds": 0.1, "grad_norm": 0.2}
    return json.dumps({"kind": "step", "step": step, "epoch": 0, **numbers}) + "\n"


class Server:
    """A studio in a process of its own, with what the kernel says of it."""

    def __init__(self, state: Path, project: Path) -> None:
        command = [sys.executable, "-m", "sd3pipe", "studio", str(project), "--port", "0", "--no-open"]
        began = time.monotonic()
        environment = {**os.environ, "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        address = re.search(r"http\S+", self.process.stdout.readline())[0]
        print(f"address printed after {time.monotonic() - began:.2f} s, {self.cpu_seconds():.2f} s of CPU time")
        self.root, _, token = address.partition("/?token=")
        self.headers = {"authorization": f"Bearer {token}"}
        page = httpx.get(f"{self.root}/p/none/train", headers=self.headers).text
        slug = re.search(r'option value="([^"]+)', page)[1]
        self.base = f"{self.root}/p/{slug}"

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self, which: str = "VmRSS") -> float:
        return int(re.search(rf"{which}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024

    def get(self, path: str) -> tuple[float, httpx.Response]:
        began = time.monotonic()
        answer = httpx.get(self.base + path, headers=self.headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return time.monotonic() - began, answer


def rest(server: Server, seconds: float) -> None:
    before = server.cpu_seconds()
    time.sleep(seconds)
    print(f"at rest: {100 * (server.cpu_seconds() - before) / seconds:.2f} % of a core, {server.memory_mb():.0f} MB")


def long_run(server: Server, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(line(step) for step in range(1, LONG + 1)))
    server.get("/train")  # imports what the page needs
    for what in ("/train", "/train/curves"):
        seconds, answer = server.get(what)
        print(f"{LONG:,} steps: {what} in {1000 * seconds:.0f} ms, {len(answer.content) / 1000:.0f} KB")


def watched(server: Server, since: str, last: int) -> list[int]:
    """Returns the steps that a watcher is told, as the page's script takes them in."""
    steps: list[int] = []
    have = int(since.partition(":")[2])
    with httpx.stream("GET", f"{server.base}/train/live?since={since}", headers=server.headers, timeout=30) as answer:
        kind = ""
        for text in answer.iter_lines():
            kind = text[7:] if text.startswith("event: ") else kind
            if text.startswith("data: ") and kind == "points":
                told = json.loads(text[6:])
                fresh = told["points"][max(0, have - told["from"]) :]
                have += len(fresh)
                steps += [int(row[0]) for row in fresh]
                if steps and steps[-1] >= last:
                    return steps
    return steps


def watching(server: Server, run: Path, seconds: int) -> None:
    since = server.get("/train/curves")[1].json()["mark"]
    last = LONG + seconds * STEPS_PER_SECOND

    def write() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            for step in range(LONG + 1, last + 1):
                file.write(line(step))
                file.flush()
                time.sleep(1 / STEPS_PER_SECOND)

    before, began = server.cpu_seconds(), time.monotonic()
    writer = threading.Thread(target=write)
    writer.start()
    with ThreadPoolExecutor(WATCHERS) as pool:
        seen = list(pool.map(lambda number: watched(server, since, last), range(WATCHERS)))
    writer.join()
    taken = time.monotonic() - began
    share = 100 * (server.cpu_seconds() - before) / taken
    whole = sum(steps == list(range(LONG + 1, last + 1)) for steps in seen)
    print(
        f"{WATCHERS} watchers, {STEPS_PER_SECOND} steps/s, {taken:.0f} s: {whole} saw every point once, "
        f"{share:.1f} % of a core"
    )


def many_pictures(server: Server, project: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)  # 1024 x 768
        Image.fromarray(pixels).save(project / "pictures" / f"{number:04d}.jpg", quality=80)
        (project / "pictures" / f"{number:04d}.txt").write_text(f"tag {number}, cat, sofa")
    server.get("/pictures")  # the first look hashes all files, once
    for which in ("without thumbnails", "with thumbnails made"):
        began, before = time.monotonic(), server.cpu_seconds()
        page = server.get("/pictures")[1].text
        shown = re.findall(r'src="/p/[^/]+(/pictures/thumb/[^"]+)', page)[:FIRST_SCREEN]
        with ThreadPoolExecutor(6) as pool:  # as many as a browser asks for at a time
            list(pool.map(server.get, shown))
        print(
            f"{PICTURES:,} pictures, first screen {which}: {time.monotonic() - began:.2f} s, "
            f"{server.cpu_seconds() - before:.2f} s of CPU time"
        )
    print(f"memory now {server.memory_mb():.0f} MB, at most {server.memory_mb('VmHWM'):.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder) / "cats", {"a": "cat"})
        server = Server(Path(folder) / "state", project)
        try:
            rest(server, 20)
            long_run(server, project / "runs" / "cat")
            watching(server, project / "runs" / "cat", seconds)
            many_pictures(server, project)
            rest(server, 20)
        finally:
            server.process.terminate()
            server.process.wait()


if __name__ == "__main__":
    main()
