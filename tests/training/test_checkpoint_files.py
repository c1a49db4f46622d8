"""A checkpoint's files: what they hold, and that a full disk costs nothing that was saved."""

import errno
import json
import os

import pytest
import torch

from sd3pipe.errors import InputError, StorageError
from sd3pipe.rules.occasions import SavingRules
from sd3pipe.training import checkpoints
from sd3pipe.training.checkpoints import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    newest_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from sd3pipe.training.state_file import Progressed

TENSORS = {
    "down": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "step": torch.tensor(7.0),
    "count": torch.tensor([3], dtype=torch.int64),
    "packed": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}


STATE = {**Progressed().to_state(), "identity": {}, "warmup_steps": 0, "optimizer": {"group/0/betas": [0.9, 0.999]}}


def save(run, step):
    return write_checkpoint(
        run, step=step, write_adapter=lambda path: path.write_bytes(b"adapter"), tensors=TENSORS, state=STATE
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


@pytest.mark.parametrize("name", [STATE_FILE, ADAPTER_FILE])
def test_a_checkpoint_that_may_not_be_read_is_not_gone_back_behind(tmp_path, monkeypatch, name):
    for step in (1, 2):
        save(tmp_path, step)
    open_file = os.open

    def refuse(path, *arguments, **named):
        if str(path).endswith(f"step-00000002/{name}"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        newest_checkpoint(tmp_path)


def edit(path, **changes):
    """Changes a state; a value of None takes the key out."""
    state = {**json.loads((path / STATE_FILE).read_text()), **changes}
    kept = {key: value for key, value in state.items() if key not in changes or value is not None}
    (path / STATE_FILE).write_text(json.dumps(kept))


EDITED = [
    {"step": 3},
    {"warmup_steps": 100},
    {"optimizer": {"group/0/betas": [0.5, 0.999]}},
    {"position": [1, 0]},
    {"skipped_steps": [1]},
    {"more": 1},
    {"digest": "0" * 64},
]


@pytest.mark.parametrize("changes", EDITED, ids=str)
def test_an_edited_state_is_named_and_the_checkpoint_before_is_taken(tmp_path, caplog, changes):
    save(tmp_path, 1)
    edited = save(tmp_path, 2).path
    edit(edited, **changes)
    with pytest.raises(InputError, match=r"step-00000002/state\.json was changed after the run wrote it"):
        read_checkpoint(edited)
    assert newest_checkpoint(tmp_path).step == 1
    assert "was changed after the run wrote it; going back to the checkpoint before it" in caplog.text


def test_a_state_of_before_there_were_digests_is_read(tmp_path):
    saved = save(tmp_path, 1)
    edit(saved.path, digest=None)
    assert read_checkpoint(saved.path).state == saved.state


def test_a_state_whose_layout_alone_was_changed_is_whole(tmp_path):
    saved = save(tmp_path, 1)
    file = saved.path / STATE_FILE
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=None))
    assert read_checkpoint(saved.path).state == saved.state


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path):
    path = save(tmp_path, 1).path
    path.rename(path.with_name("step-00000009"))
    with pytest.raises(InputError, match="is that of step 1"):
        read_checkpoint(path.with_name("step-00000009"))
    path.with_name("step-00000009").rename(tmp_path / "mine")
    assert read_checkpoint(tmp_path / "mine").step == 1


def test_a_checkpoint_without_its_optimizer_is_whole(tmp_path):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    prune(tmp_path, newest, SavingRules(save_last_n_steps_state=0))
    assert not (older.path / OPTIMIZER_FILE).exists()
    assert not read_checkpoint(older.path).can_resume


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": -1},
        {"position": [0]},
        {"position": [0, 0.5]},
        {"files": {}, "identity": []},
        {"files": {"../../etc/passwd": {"bytes": 1, "blake3": ""}}},
        {"skipped_steps": None},
        {"loss_last": "low"},
        {"loss_scale": {"scale": "x"}},
        {"changes": 3},
    ],
    ids=str,
)
def test_a_state_of_another_shape_is_damaged(tmp_path, changes):
    path = save(tmp_path, 1).path
    edit(path, **{"digest": None, **changes})
    with pytest.raises(InputError, match=r"state\.json: "):
        read_checkpoint(path)


def test_an_optimizer_state_that_a_killed_process_has_left_goes_later(tmp_path):
    """Its entry in state.json goes first, and a kill may come in between."""
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    left = (older.path / OPTIMIZER_FILE).read_bytes()
    prune(tmp_path, newest, SavingRules(save_last_n_steps_state=0))
    (older.path / OPTIMIZER_FILE).write_bytes(left)
    prune(tmp_path, newest, SavingRules(save_last_n_steps_state=0))
    assert not (older.path / OPTIMIZER_FILE).exists()
