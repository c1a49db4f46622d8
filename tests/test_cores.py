"""Threads are as many as the user, the scheduler and a container allow, and do not wait for each other by spinning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd3pipe.cores import bound_spinning, thread_count, usable_cores


def quota(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),  # half a core is one thread
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "not a number"}, None),
        ({}, None),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path, files, cores):
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(quota(tmp_path, files)) == (cores or mine)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_affinity_bounds_the_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from sd3pipe.cores import usable_cores; "
    )
    done = subprocess.run([sys.executable, "-c", code + "print(usable_cores())"], capture_output=True, check=True)
    assert done.stdout.strip() == b"1"


@pytest.mark.parametrize(
    ("threads", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "7"}, 3),
        (None, {"OMP_NUM_THREADS": "7"}, 7),
        (None, {"OMP_NUM_THREADS": "5,2"}, 5),
        (None, {"OMP_NUM_THREADS": "1"}, 1),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, usable_cores()),
        (None, {"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "none"}, 4),
        (None, {"OMP_NUM_THREADS": "many"}, usable_cores()),
        (None, {"OMP_NUM_THREADS": "0"}, usable_cores()),
        (None, {}, usable_cores()),
    ],
)
def test_the_users_word_counts_before_the_machine(threads, environment, expected):
    assert thread_count(threads, environment) == expected


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND"])
def test_how_threads_wait_is_left_to_who_has_set_it(name):
    environment = {name: "x"}
    bound_spinning(environment)
    assert environment == {name: "x"}


def test_the_command_line_bounds_spinning_before_torch_is_there(tmp_path):
    (tmp_path / "probe.py").write_text(
        "import os, sys; from sd3pipe import cli; cli.run(['--version']); "
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], capture_output=True, check=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1].split() == ["False", "10000"]


@pytest.mark.long
def test_torch_computes_with_the_threads_that_the_environment_says():
    code = (
        "import torch; from sd3pipe.device import choose_device; choose_device('cpu'); print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == b"1"
