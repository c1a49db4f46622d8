"""A folder full of modules that are named after all that is imported changes nothing: none of them is ever run."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from PIL import Image

from sd3pipe.demo.base_files import MODEL, TOKENIZERS

PROGRAM = Path(sys.executable).with_name("sd3pipe")
NOT_SHADOWED = {"sd3pipe", "__main__", "__mp_main__"}  # the program itself: SECURITY.md says what `python -m` takes


@pytest.fixture(scope="module")
def traps() -> set[str]:
    """The name of everything that can be imported here, and of what is tried without being installed."""
    names = {name for name in packages_distributions() if name.isidentifier()} | sys.stdlib_module_names
    names |= {"sitecustomize", "usercustomize", "prodigyopt", "wandb", "torchvision", "xformers", "apex"}
    assert {"typer", "torch", "numpy", "pickle", "tokenize", "accelerate", "safetensors", "PIL", "zarr"} <= names
    return names - NOT_SHADOWED


@pytest.fixture
def project(tmp_path, traps):
    """A project in a folder of traps; each notes in `ran` that it was run."""
    for number in range(6):
        picture = Image.new("RGB", (64, 64), (40 * number, 90, 30))
        picture.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a large red circle on a blue background, number {number}")
    (tmp_path / "d.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\n")
    (tmp_path / "project.toml").write_text(
        f"[paths]\nmodel = '{MODEL}'\ntokenizers = '{TOKENIZERS}'\ndataset = 'd.toml'\ncaches = 'caches'\n"
        "run = 'runs/x'\nexport = 'x.safetensors'\n"
    )
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "train.toml").write_text(
        "max_train_steps = 2\nnetwork_dim = 2\nmax_data_loader_n_workers = 2\n"
    )
    (tmp_path / "stages" / "encode_latents.toml").write_text("max_data_loader_n_workers = 2\n")
    for name in traps:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return tmp_path


def what_ran(folder: Path) -> str:
    return (folder / "ran").read_text() if (folder / "ran").exists() else ""


def run(folder: Path, *command: object, **environment: str) -> str:
    without = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=without | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_traps_work(project):
    run(project, sys.executable, "-c", "import typer")
    assert what_ran(project).endswith("typer")


@pytest.mark.slow
def test_no_stage_and_none_of_its_workers_runs_what_lies_in_the_project(project):
    said = run(project, PROGRAM, "run")
    assert "7 encoded" in said and "6 encoded" in said and "train: 2 steps" in said  # captions, and the empty one
    assert what_ran(project) == ""


@pytest.mark.parametrize("search_path", [":/nowhere", "."])
def test_nor_where_the_search_path_names_the_current_folder(tmp_path, search_path):
    """What Python needs to start it takes from there before any line of ours; the rest it does not, here and below."""
    for name in ("typer", "numpy", "tomllib"):
        (tmp_path / f"{name}.py").write_text(f"open('ran', 'a').write({name!r})\n")
    run(tmp_path, sys.executable, "-c", "import tomllib", PYTHONPATH=search_path)
    assert what_ran(tmp_path) == "tomllib"
    ours = "from sd3pipe.safe_path import leave_current_folder_out as leave; leave(); import typer, numpy, tomllib"
    below = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import typer, numpy, tomllib'], check=True)"
    run(tmp_path, sys.executable, "-c", f"{ours}; {below}", PYTHONPATH=search_path)
    assert what_ran(tmp_path) == "tomllib"


@pytest.mark.long
def test_python_m_runs_none_of_them_either(project):
    """But for those that Python itself imports for `-m`, before any line of ours."""
    of_python = run(project, sys.executable, "-P", "-c", "import runpy, sys; print(*sys.modules)").split()
    for name in of_python:
        (project / f"{name}.py").unlink(missing_ok=True)
    run(project, sys.executable, "-m", "sd3pipe", "encode-latents")
    assert what_ran(project) == ""


@pytest.mark.slow
def test_no_rank_of_torchrun_does(project):
    ranks = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", PROGRAM]
    assert "encoded" in run(project, sys.executable, *ranks, "encode-latents", "--threads=1")
    run(project, PROGRAM, "encode-text")
    run(project, sys.executable, *ranks, "train", "--threads=1", GLOO_SOCKET_IFNAME="lo")
    assert what_ran(project) == ""


@pytest.mark.slow
def test_no_worker_of_ray_does(project):
    pytest.importorskip("ray", reason='needs Ray: pip install "sd3pipe[ray]"')
    assert "6 encoded" in run(project, PROGRAM, "encode-latents", "--engine", "ray", "--ray-workers", "2")
    assert what_ran(project) == ""


@pytest.mark.slow
def test_the_demo_does_not(tmp_path, traps):
    for name in traps:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    run(tmp_path, PROGRAM, "demo", ".", "--steps", "1", "--seeds", "1")
    assert what_ran(tmp_path) == ""
