"""Fixtures that all tests share. Threads are pinned before torch is imported, so that bits can be compared."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real tokenizers and configurations; a test that asks for it skips where it is missing."""
    folder = Path(os.environ.get("SD3PIPE_SHARED", ROOT.parent / "shared"))
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers and configurations at {folder}; set SD3PIPE_SHARED")
    return folder
