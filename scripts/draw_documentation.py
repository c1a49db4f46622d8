"""Draws the pictures of README and docs/ from a demo that it runs, or goes on with.

    scripts/draw_documentation.py FOLDER

It takes the demo's minutes, and a Chromium. Run it when a page of the product looks another way.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sd3pipe.demo.project import RUN

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
MOST_BYTES = 200_000  # of a picture: it is in every clone
SHOWN_FROM_STEP, STEPS = 160, 400  # of the run that is drawn while it goes
SIZE = {"width": 1280, "height": 800}


def main(folder: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    sd3pipe("demo", str(folder), folder=folder.parent)
    save(Image.open(folder / "before-and-after.png"), "before-and-after")
    with browser_page() as page:
        draw_pages(folder, page)
        draw_run(folder, page)


def draw_run(folder: Path, page: Page) -> None:
    """Draws the studio over a second run of the demo's project, in a copy, while it goes."""
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(shutil.copytree(folder, Path(scratch, folder.name), ignore=shutil.ignore_patterns("runs")))
        options = project / "stages" / "train.toml"
        text = re.sub(r"(?m)^max_train_steps = .*", f"max_train_steps = {STEPS}", options.read_text("utf-8"))
        options.write_text(re.sub(r"(?m)^(s\w+_every_n_steps) = .*", r"\1 = 50", text), "utf-8")
        with subprocess.Popen([sys.executable, "-m", "sd3pipe", "train"], cwd=project) as train:
            try:
                with studio(project) as address:
                    page.goto(address)
                    page.goto(page.url.rpartition("/")[0] + "/train")
                    while not page.evaluate(f"document.querySelector('#train').dataset.steps >= {SHOWN_FROM_STEP}"):
                        page.wait_for_timeout(500)
                    shoot(page, "studio")
            finally:
                train.terminate()


def draw_pages(folder: Path, page: Page) -> None:
    """Draws the pages that commands write."""
    with tempfile.TemporaryDirectory() as scratch:
        sd3pipe("preview", "--out", f"{scratch}/preview", folder=folder)
        sd3pipe("report", RUN, "--out", f"{scratch}/report.html", folder=folder)
        for name, file in {"preview": "preview/index.html", "report": "report.html"}.items():
            page.goto(Path(scratch, file).as_uri())
            shoot(page, name)


def sd3pipe(*arguments: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "sd3pipe", *arguments], cwd=folder, check=True)


@contextlib.contextmanager
def studio(folder: Path) -> Iterator[str]:
    """Serves the studio over a project and yields the address that it prints."""
    command = [sys.executable, "-m", "sd3pipe", "studio", str(folder), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.search(r"http\S+", process.stdout.readline())
        assert found, "the studio has not told its address"
        try:
            yield found[0]
        finally:
            process.terminate()


@contextlib.contextmanager
def browser_page() -> Iterator[Page]:
    """Opens a page of the Chromium that is installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport=SIZE, color_scheme="light")
        browser.close()


def shoot(page: Page, name: str) -> None:
    page.wait_for_load_state("load")
    save(Image.open(BytesIO(page.screenshot())), name)


def save(picture: Image.Image, name: str) -> None:
    """Writes a picture as WebP, in the best quality that is small enough, or the lowest."""
    for quality in range(90, 0, -10):
        data = BytesIO()
        picture.convert("RGB").save(data, "WEBP", quality=quality, method=6)
        (PICTURES / f"{name}.webp").write_bytes(data.getvalue())
        if data.tell() <= MOST_BYTES:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
