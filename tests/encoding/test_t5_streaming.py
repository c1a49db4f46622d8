"""When T5 is read block by block: by wish, or where the memory would not hold it."""

import pytest
import torch

from sd3pipe.demo.tiny import write_tiny_base
from sd3pipe.encoding import t5_streaming
from sd3pipe.encoding.t5_streaming import available_memory, streams_t5
from sd3pipe.models.sources import find_component

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return find_component("t5xxl", model=write_tiny_base(tmp_path_factory.mktemp("base")).model)


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, True), (3 << 30, False), (None, False)])
def test_auto_streams_where_memory_is_short(source, monkeypatch, free, expected):
    monkeypatch.setattr(t5_streaming, "available_memory", lambda: free)
    assert streams_t5("auto", source, torch.bfloat16, CPU) is expected
    assert streams_t5("on", source, torch.bfloat16, CPU) is True
    assert streams_t5("off", source, torch.bfloat16, CPU) is False


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
