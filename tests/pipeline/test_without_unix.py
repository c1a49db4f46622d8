"""The whole pipeline where a system lacks what Unix has, with files as other systems write them."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import report_of, sd3pipe
from support.elsewhere import as_elsewhere

from sd3pipe.demo.base_files import MODEL, TOKENIZERS
from sd3pipe.fingerprint import hash_file

pytestmark = pytest.mark.slow
TEXTS = {
    "dataset.toml": "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'photos'\ncaption_prefix = 'a'\n",
    "prompts.txt": "# what to draw\na red circle --w 64 --h 64 --s 1 --d 1\n",
    "project.toml": f"[paths]\nmodel = '{MODEL}'\ntokenizers = '{TOKENIZERS}'\ndataset = 'dataset.toml'\n"
    "sample_prompts = 'prompts.txt'\ncaches = 'caches'\nrun = 'runs/x'\nexport = 'x.safetensors'\n",
    "stages/train.toml": "max_train_steps = 3\nnetwork_dim = 2\nsave_every_n_steps = 2\n",
    "stages/encode_latents.toml": "workers = 1\n",
    "photos/0.txt": "a red circle\n",
    "photos/1.txt": "a blue square\nand a second line\n",
}


def write_project(folder: Path) -> Path:
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 90, 30)).save(folder / f"photos/{number}.png")
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    project = write_project(tmp_path_factory.mktemp("systems") / "here")
    sd3pipe("run", cwd=project)
    return project


def results(project: Path) -> dict[str, str]:
    """Returns the content of what the stages made, by name."""
    made = [
        file for place in ("caches/text", "caches/latents", "caches/prompts") for file in (project / place).rglob("*")
    ]
    made += [project / "runs/x/final/adapter.safetensors", project / "x.safetensors"]
    return {file.relative_to(project).as_posix(): hash_file(file) for file in made if file.is_file()}


def test_nothing_relies_on_what_unix_alone_has(here, tmp_path):
    project = write_project(
        tmp_path / "Meine Bilder" / ("so long a name " * 8) / ("that no path of Windows " * 6) / "holds it"
    )
    assert len(str(project)) > 260  # what Windows' programs take unless they say otherwise
    sd3pipe("run", cwd=project, env=as_elsewhere(tmp_path / "site"))
    assert results(project) == results(here)


def test_line_ends_and_byte_order_marks_of_windows_change_nothing(here, tmp_path):
    project = shutil.copytree(here, tmp_path / "project")
    for name, text in TEXTS.items():
        mark = "\ufeff" if name.startswith("photos") else ""
        (project / name).write_bytes((mark + text.replace("\n", "\r\n")).encode())
    sd3pipe("run", cwd=project)
    assert [report_of(project / f"caches/{cache}")["encoded"] for cache in ("text", "latents", "prompts")] == [0, 0, 0]
    assert results(project) == results(here)
