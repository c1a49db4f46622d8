"""The notebook's cells, one after the other, on the demo's base and pictures; then again, as on a new machine."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.documented import ROOT
from support.environments import make_environment, run_here

from sd3pipe.demo.base_files import MODEL, TOKENIZERS
from sd3pipe.demo.drawings import draw
from sd3pipe.demo.project import LEARNT

NOTEBOOK = ROOT / "notebooks" / "rented_gpu.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code_cells() -> Iterator[tuple[str, bool]]:
    """Yields the source of each cell of code, and whether its values are the reader's own to set."""
    for cell in CELLS:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())


def as_python(source: str) -> str:
    """Returns a cell with IPython's `!command` and `%cd folder` as calls; both fill in `{NAME}`."""
    joined = re.sub(r"\\\n\s*", "", source)
    calls = re.sub(r"^!(.*)$", lambda line: f"shell(f{line[1]!r})", joined, flags=re.MULTILINE)
    return re.sub(r"^%cd (.*)$", lambda line: f"os.chdir(f{line[1]!r})", calls, flags=re.MULTILINE)


class Notebook:
    """The drive and what stands on it; each run of it is a new machine's, with the package installed already."""

    def __init__(self, drive: Path, variables: dict[str, str]) -> None:
        self.drive, self.project, self.variables = drive, drive / "mine", {**variables, "OMP_NUM_THREADS": "1"}
        self.shown: list[Any] = []
        self.steps = 0

    def shell(self, command: str) -> None:
        if " run " in command:
            self.make_small()
        run_here(["bash", "-c", command], Path.cwd(), self.variables)

    def run(self, steps: int) -> None:
        self.steps = steps
        names: dict[str, Any] = {"os": os, "shell": self.shell, "display": self.shown.append}
        with contextlib.chdir(self.drive):
            for source, is_for_the_reader in code_cells():
                exec(as_python(source), names)
                if is_for_the_reader:
                    places = {"DRIVE": self.drive, "IMAGES": self.drive / "photos", "PROJECT": self.project}
                    places |= {"MODEL": MODEL, "TOKENIZERS": TOKENIZERS}
                    names |= {name: str(place) for name, place in places.items()}

    def make_small(self) -> None:
        for name, pattern, small in (
            ("stages/train.toml", r"^max_train_steps = .*", f"max_train_steps = {self.steps}"),
            ("sample_prompts.txt", r"--w \d+ --h \d+( --s 1)?", "--w 64 --h 64 --s 1"),
        ):
            file = self.project / name
            file.write_text(re.sub(pattern, small, file.read_text(), flags=re.MULTILINE))

    def report(self) -> dict[str, Any]:
        return json.loads((self.project / "runs/mycat/report.json").read_text())


def test_no_output_is_kept_in_the_notebook():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)


@pytest.mark.slow
def test_cells_make_a_lora_and_go_on_with_it_on_another_machine(wheel, tmp_path):
    drive = tmp_path / "drive"
    (drive / "photos").mkdir(parents=True)
    shutil.copy(wheel, drive)
    for number, subject in enumerate(LEARNT[:2]):
        drawing = draw(subject, height=64, width=64, generator=np.random.default_rng(number))
        Image.fromarray(drawing).save(drive / "photos" / f"{number}.png")
        (drive / "photos" / f"{number}.txt").write_text(f"a {subject.colour} shape")
    notebook = Notebook(drive, make_environment(tmp_path / "venv"))
    for steps in (2, 3):
        notebook.run(steps)
        assert notebook.report()["steps"] == steps
    assert notebook.report()["steps_now"] == 1  # it went on where the other machine was
    assert (notebook.project / "exports/mycat.safetensors").is_file() and len(notebook.shown) == 2
