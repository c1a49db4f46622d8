"""The wheel holds the whole package, and the demo runs from it where nothing else of this repository is."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from support.documented import ROOT
from support.environments import PIP, build_wheel, make_environment, tracked_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for file in tracked_files("sd3pipe", "pyproject.toml", "README.md", "LICENSE"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)
    return build_wheel(source, tmp_path_factory.mktemp("dist"))


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {file.as_posix() for file in tracked_files("sd3pipe")}


def test_demo_runs_from_the_wheel_in_an_environment_of_its_own(wheel, tmp_path):
    programs = make_environment(tmp_path / "venv")
    subprocess.run([*PIP, "--python", str(programs / "python"), "install", "--no-deps", str(wheel)], check=True)
    origin = [str(programs / "python"), "-c", "import sd3pipe; print(sd3pipe.__file__)"]
    imported = subprocess.run(origin, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(imported).is_relative_to(tmp_path / "venv")
    demo = [str(programs / "sd3pipe"), "demo", "demo", "--steps", "2", "--seeds", "1"]
    done = subprocess.run(demo, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "before-and-after.png").is_file()
