"""A captioner that was trained on drawings says what is on drawings that it has never seen."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import report_of, sd3pipe

from sd3pipe.demo.drawings import all_subjects, draw

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_demo_captioner.py"
DRAWINGS, RIGHT = 200, 0.9


@pytest.mark.slow  # trains it: 70 CPU seconds
def test_it_says_shape_colour_size_and_background_of_drawings_it_never_saw(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "captioner"], check=True, capture_output=True)
    size = sum(file.stat().st_size for file in (tmp_path / "captioner").iterdir())
    assert size < 3e6
    generator = np.random.default_rng(2026)
    subjects = [all_subjects()[number] for number in generator.integers(len(all_subjects()), size=DRAWINGS)]
    (tmp_path / "drawings").mkdir()
    for number, subject in enumerate(subjects):
        pixels_HWC = draw(subject, height=64, width=64, generator=generator)
        Image.fromarray(pixels_HWC).save(tmp_path / "drawings" / f"{number:03d}.png")
    sd3pipe(
        "caption", "--images", "drawings", "--captioner", "captioner", "--out", "captions", "--device", "cpu",
        "--captioner-dtype", "float32", "--max-new-tokens", 16, "--captioner-batch-size", 20, cwd=tmp_path,
    )  # fmt: skip
    assert report_of(tmp_path / "captions")["written"] == DRAWINGS
    said = [(tmp_path / "drawings" / f"{number:03d}.txt").read_text().strip() for number in range(DRAWINGS)]
    for part in ("shape", "colour", "size", "background"):
        right = sum(_part(text, part) == getattr(subject, part) for text, subject in zip(said, subjects, strict=True))
        assert right >= RIGHT * DRAWINGS, f"{part}: {right} of {DRAWINGS}, such as {said[:3]}"


def _part(caption: str, part: str) -> str:
    """Returns a part of `a SIZE COLOUR SHAPE on a BACKGROUND background`."""
    place = {"size": 1, "colour": 2, "shape": 3, "background": 6}[part]
    words = caption.split()
    return words[place] if len(words) > place else ""
