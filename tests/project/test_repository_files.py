"""The repository's own project files are those that the option sets and the demo make."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3pipe.demo.project import picture_files, project_texts
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import option_extra

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"


def expected_texts() -> dict[str, str]:
    return runpy.run_path(str(ROOT / "scripts" / "write_stage_files.py"))["texts"]()


@pytest.mark.long
@pytest.mark.parametrize("name", [*(f"stages/{name}.toml" for name in load_stage_models()), "dvc.yaml"])
def test_file_is_in_step_with_the_options(name):
    message = f"{name} is not what the option sets say: run scripts/write_stage_files.py"
    assert (ROOT / name).read_text(encoding="utf-8") == expected_texts()[name], message


@pytest.mark.parametrize("name", ["dataset.toml", "sample_prompts.txt"])
def test_example_texts_are_the_demos(name):
    assert (DEMO / name).read_text(encoding="utf-8") == project_texts(steps=300)[name]


@pytest.mark.long
def test_example_pictures_are_the_demos():
    for name, content in picture_files().items():
        there = (DEMO / name).read_bytes()
        if name.endswith(".png"):
            assert np.array_equal(pixels(there), pixels(content)), name  # PNG's bytes depend on the zlib at hand
        else:
            assert there == content, name


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_train_shows_about_25_options_at_first():
    fields = load_stage_models()["train"].model_fields.values()
    shown = [field for field in fields if not option_extra(field)["advanced"]]
    assert 20 <= len(shown) <= 32


@pytest.mark.parametrize(
    ("page", "script"), [("from-sd-scripts.md", "write_from_sd_scripts.py"), ("python.md", "write_python_page.py")]
)
def test_a_page_that_the_code_writes_is_in_step(page, script):
    written = runpy.run_path(str(ROOT / "scripts" / script))["page"]()
    message = f"docs/{page} is not what the code says: run scripts/{script}"
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == written, message
    assert "no such option" not in page
