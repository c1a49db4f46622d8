"""The wheel, built once."""

import os
import shutil
from pathlib import Path

import pytest
from support.documented import ROOT
from support.environments import build_wheel, tracked_files


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    if os.name == "nt":
        pytest.skip("environments of other systems are laid out another way")
    source = tmp_path_factory.mktemp("source")
    for file in tracked_files("sd3pipe", "pyproject.toml", "README.md", "LICENSE"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)
    return build_wheel(source, tmp_path_factory.mktemp("dist"))
