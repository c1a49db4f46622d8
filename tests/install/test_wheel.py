"""The wheel holds the whole package, and the demo runs from it where nothing else of this repository is."""

import zipfile
from pathlib import Path

import pytest
from support.environments import make_environment, run_here, tracked_files

pytestmark = pytest.mark.slow


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {file.as_posix() for file in tracked_files("sd3pipe")}


def test_demo_runs_from_the_wheel_in_an_environment_of_its_own(wheel, tmp_path):
    variables = make_environment(tmp_path / "venv")
    run_here(["pip", "install", "--quiet", str(wheel)], tmp_path, variables)
    imported = run_here(["python", "-c", "import sd3pipe; print(sd3pipe.__file__)"], tmp_path, variables)
    assert Path(imported.strip()).is_relative_to(tmp_path / "venv")
    run_here(["sd3pipe", "demo", "demo", "--steps", "2", "--seeds", "1"], tmp_path, variables)
    assert (tmp_path / "demo" / "before-and-after.png").is_file()
