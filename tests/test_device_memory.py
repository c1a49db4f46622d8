"""Memory that is left, and errors that say there is none."""

import pytest
import torch

from sd3pipe.device_memory import available_memory, memory_errors, share_of_memory
from sd3pipe.errors import DeviceMemoryError


def written(root, meminfo=None, **cgroup):
    (root / "proc").mkdir()
    (root / "sys/fs/cgroup").mkdir(parents=True)
    if meminfo:
        (root / "proc/meminfo").write_text(meminfo)
    for name, text in cgroup.items():
        (root / "sys/fs/cgroup" / name.replace("_", ".")).write_text(text)
    return root


def test_the_systems_memory_counts(tmp_path):
    meminfo = "MemTotal:  100 kB\nMemAvailable:    50 kB\nHugePages_Total:   0\n"
    assert available_memory(written(tmp_path, meminfo, memory_max="max\n")) == 50 * 1024


def test_a_container_may_allow_less(tmp_path):
    root = written(
        tmp_path,
        "MemAvailable: 1000000 kB\n",
        memory_max="8000\n",
        memory_current="5000\n",
        memory_stat="anon 4000\ninactive_file 700\n",
    )
    assert available_memory(root) == 3700


def test_an_unknown_system_tells_nothing(tmp_path):
    assert available_memory(tmp_path) is None


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("sd3pipe.device_memory.available_memory", lambda: 1000)
    assert share_of_memory() == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert share_of_memory() == 250


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
            "host",
        ),
        (MemoryError(), "host"),
    ],
)
def test_running_out_of_memory_is_answered_with_a_way_out(error, where):
    message = f"the {where} ran out of memory: buy a larger one"
    with pytest.raises(DeviceMemoryError, match=message) as caught, memory_errors(lambda: "buy a larger one"):
        raise error
    assert caught.value.exit_code == 8


def test_the_cpus_allocator_is_understood():
    with pytest.raises(DeviceMemoryError, match="the host ran out of memory"), memory_errors(lambda: "less"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(lambda: "less"):
        raise RuntimeError("shapes do not fit")
