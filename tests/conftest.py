"""Fixtures that all tests share. Threads are pinned before torch is imported, so that bits can be compared."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # tests start hundreds of processes, which share what is compiled
sys.path.insert(0, str(Path(__file__).parent))

import pytest

if TYPE_CHECKING:
    from support.tiny_base import TinyBase

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = (  # what these share takes minutes to make: with --dist loadscope one worker makes it, and runs them all
    "tests/demo/",
    "tests/docs/test_command_blocks.py",
    "tests/pipeline/test_without_unix.py",
)


def pytest_collection_finish() -> None:
    """Leaves torch, transformers and the tests themselves out of what the collector walks while tests run."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lets all other tests go to whichever worker is free."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real tokenizers and configurations; a test that asks for it skips where it is missing."""
    folder = Path(os.environ.get("SD3PIPE_SHARED", ROOT.parent / "shared"))
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers and configurations at {folder}; set SD3PIPE_SHARED")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> "TinyBase":
    """A tiny SD3.5-medium whose text encoders lie in files of their own; tests share it and write nothing there."""
    from support.tiny_base import write_tiny_base  # torch takes seconds, and many tests need none of it

    return write_tiny_base(tmp_path_factory.mktemp("base"), layout="separate")
