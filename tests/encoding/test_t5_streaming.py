"""When T5 is read block by block: by wish, or where the memory would not hold it."""

import pytest
import torch
from support.tiny_base import write_tiny_base

from sd3pipe.encoding import t5_memory
from sd3pipe.encoding.t5_memory import streams_t5
from sd3pipe.models.sources import find_component

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return find_component("t5xxl", model=write_tiny_base(tmp_path_factory.mktemp("base")).model)


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, True), (3 << 30, False), (None, False)])
def test_auto_streams_where_memory_is_short(source, monkeypatch, free, expected):
    monkeypatch.setattr(t5_memory, "available_memory", lambda: free)
    assert streams_t5("auto", source, torch.bfloat16, CPU) is expected
    assert streams_t5("on", source, torch.bfloat16, CPU) is True
    assert streams_t5("off", source, torch.bfloat16, CPU) is False
