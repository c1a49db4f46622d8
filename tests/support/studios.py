"""Projects for the studio's tests, and the studio asked without a network."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
from PIL import Image

from sd3pipe.cache.folder import machine_folder
from sd3pipe.studio.app import Projects, Studio, application
from sd3pipe.studio.queue import Queue
from sd3pipe.studio.safety import Access
from sd3pipe.studio.watch import Watches

TOKEN = "a-token-for-tests"
_HOLDER = """
import sys, time
from pathlib import Path
from sd3pipe.files import lock_file
with lock_file(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""
_PROJECT = """\
[paths]
model = "model.safetensors"
dataset = "dataset.toml"
caches = "caches"
run = "runs/cat"
export = "exports/cat.safetensors"
"""
_DATASET = """\
[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 96
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = "pictures"
caption_prefix = "photo of"
"""


def write_pictures(folder: Path, captions: dict[str, str], *, side: int = 96) -> None:
    """Writes a PNG of one colour for each name, all different, with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, caption) in enumerate(captions.items()):
        pixels = np.full((side, side, 3), (number * 37 % 256, number * 91 % 256, number // 256), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        (folder / f"{name}.png").write_bytes(data.getvalue())
        if caption:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def write_project(folder: Path, captions: dict[str, str], *, dataset: str = _DATASET) -> Path:
    """Writes a project whose model is not there, with pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "project.toml").write_text(_PROJECT)
    (folder / "dataset.toml").write_text(dataset)
    write_pictures(folder / "pictures", captions)
    return folder


def run_at_a_terminal(project: Path) -> subprocess.Popen[str]:
    """Starts a process that holds the lock of the project's run, as train does while it works."""
    lock = machine_folder(project / "runs" / "cat").parent / "cat.lock"
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "holds\n"
    return holder


def studio_of(state: Path, *projects: Path, origin: str | None = None, read_only: bool = False) -> Studio:
    """Returns a studio over projects, with its queue in a folder of the test's."""
    queue = Queue(state / "state")
    access = Access(token=TOKEN, host="127.0.0.1", port=8400, origin=origin, read_only=read_only)
    return Studio(access=access, projects=Projects(projects), queue=queue, watches=Watches(queue))


def asked(
    studio: Studio, method: str, path: str, *, token: str = TOKEN, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    """Returns the answer to one request."""
    sent = {"host": "127.0.0.1:8400", **({"authorization": f"Bearer {token}"} if token else {}), **(headers or {})}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=application(studio))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8400") as client:
            return await client.request(method, path, headers=sent, **more)

    return anyio.run(ask)
