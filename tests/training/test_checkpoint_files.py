"""A checkpoint's files: what they hold, and that a full disk costs nothing that was saved."""

import errno

import pytest
import torch

from sd3pipe.errors import StorageError
from sd3pipe.training import checkpoints
from sd3pipe.training.checkpoints import ADAPTER_FILE, read_checkpoint, write_checkpoint

TENSORS = {
    "down": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "step": torch.tensor(7.0),
    "count": torch.tensor([3], dtype=torch.int64),
    "packed": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}


def save(run, step):
    return write_checkpoint(
        run, step=step, write_adapter=lambda path: path.write_bytes(b"adapter"), tensors=TENSORS, state={}
    )


def test_tensors_of_every_kind_come_back(tmp_path):
    read = read_checkpoint(save(tmp_path, 1).path)
    assert read.step == 1 and (read.path / ADAPTER_FILE).read_bytes() == b"adapter"
    tensors = read.tensors()
    assert tensors.keys() == TENSORS.keys()
    assert all(
        tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items()
    )


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    before = save(tmp_path, 1).path

    def full(handle, tensors, metadata):
        handle.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    for step in (1, 2):
        with pytest.raises(StorageError, match="the disk is full"):
            save(tmp_path, step)
    assert [path.name for path in before.parent.iterdir()] == [before.name]
    assert read_checkpoint(before).step == 1
