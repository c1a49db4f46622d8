"""Page-locked host buffers, with CUDA's runtime replaced: what is locked, what is unlocked, what failing does."""

import contextlib

import pytest
import torch

from sd3pipe.memory.host import HostMemory

CUDA = torch.device("cuda", 0)


class FakeRuntime:
    """Locks until `limit` bytes are locked, then answers as CUDA does without memory."""

    def __init__(self, limit):
        self.limit = limit
        self.locked = {}

    def cudaHostRegister(self, pointer, nbytes, flags):
        if sum(self.locked.values()) + nbytes > self.limit:
            return 2  # cudaErrorMemoryAllocation
        self.locked[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer):
        del self.locked[pointer]


def _failing_kernel(*args, **kwargs):
    raise RuntimeError("CUDA error: out of memory")  # what CUDA had on record


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime(limit=10_000_000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "zeros", _failing_kernel)
    return fake


def test_buffers_are_locked_at_their_exact_size_on_pages_of_their_own(runtime):
    memory = HostMemory(CUDA)
    buffers = [memory.buffer(nbytes) for nbytes in (5_000, 3_000_001)]
    assert list(runtime.locked.values()) == [5_000, 3_000_001]
    assert all(buffer.data_ptr() % 4096 == 0 for buffer in buffers)
    buffers[1].fill_(7)
    memory.close()
    assert runtime.locked == {}
    assert int(buffers[1][-1]) == 7


def test_buffers_are_unlocked_when_the_memory_is_forgotten(runtime):
    memory = HostMemory(CUDA)
    memory.buffer(5_000)
    assert runtime.locked
    del memory
    assert runtime.locked == {}


def test_failing_to_lock_is_told_once_and_memory_is_handed_out_all_the_same(runtime, caplog):
    memory = HostMemory(CUDA)
    buffers = [memory.buffer(4_000_000) for _ in range(4)]
    assert memory.pinned_bytes == 8_000_000
    assert not memory.pinned
    assert [buffer.numel() for buffer in buffers] == [4_000_000] * 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not page-lock more host memory (CUDA error 2): after 0.0 GB" in caplog.text
    assert "ulimit -l" in caplog.text
    memory.close()


def test_a_small_host_keeps_memory_that_is_not_locked(runtime, caplog, monkeypatch):
    free = iter([(1 << 30) + 5_000_000, (1 << 30) + 1_000_000])
    monkeypatch.setattr("sd3pipe.memory.host.share_of_memory", lambda: next(free))
    memory = HostMemory(CUDA)
    buffers = [memory.buffer(4_000_000) for _ in range(3)]
    assert memory.pinned_bytes == 4_000_000
    assert [buffer.numel() for buffer in buffers] == [4_000_000] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the host has 1.1 GB of memory left" in caplog.text
    assert "--base-dtype int8" in caplog.text
    memory.close()


def test_without_cuda_nothing_is_locked():
    memory = HostMemory(torch.device("cpu"))
    assert memory.buffer(100).numel() == 100
    assert not memory.pinned
    assert memory.pinned_bytes == 0
