"""Whatever ends a new run before it has saved anything leaves the finished run in its folder, byte for byte."""

import errno
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import forked, tiny_training
from support.comparing import folder_bytes
from support.tiny_training import Inputs, fill_prompts, make_inputs, pictures

from sd3pipe.errors import ExitCode, Sd3pipeError
from sd3pipe.training import checkpoints, setup
from sd3pipe.training.objective import Objective
from sd3pipe.training.records import read_records

RUN = "finished"
ANOTHER = {"seed": 7}  # what makes a run another one


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    inputs = make_inputs(tmp_path_factory.mktemp("refusals"), pictures(3), max_train_steps=2)
    inputs.train(RUN)
    return inputs


@pytest.fixture
def kept_run(inputs):
    """Fails the test if the finished run is not as it was, or another folder lies beside it."""
    runs = inputs.folder / "runs"
    before = folder_bytes(runs / RUN)
    yield
    assert folder_bytes(runs / RUN) == before
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == [".sd3pipe", RUN]


@pytest.fixture
def kept(inputs, kept_run):
    """Fails the test also if anything of the refused run is left."""
    yield
    runs = inputs.folder / "runs"
    assert not (runs / ".sd3pipe" / f"{RUN}.new").exists()


def refused(inputs: Inputs, **options) -> Sd3pipeError:
    """Trains into the finished run's folder, which is refused, and returns the error."""
    with pytest.raises(Sd3pipeError) as caught:
        inputs.train(RUN, **{**ANOTHER, **options})
    record = json.loads((inputs.folder / "runs" / f"{RUN}.refused.report.json").read_text())
    assert record["exit_code"] == caught.value.exit_code and record["began"] is False
    return caught.value


OPTIONS = {
    "an unknown optimizer": (2, {"optimizer_type": "AdamX"}),
    "an optimizer that is not installed": (2, {"optimizer_type": "nowhere.Optimizer"}),
    "an argument that is no literal": (2, {"optimizer_args": ("betas=nine",)}),
    "an unknown argument": (2, {"optimizer_args": ("beta=0.9",)}),
    "an argument out of range": (2, {"optimizer_args": ("betas=(2.0, 0.9)",)}),
    "an unknown network argument": (2, {"network_args": ("conv_dim=8",)}),
    "too few embedder ranks": (2, {"network_args": ("emb_dims=[1,2]",)}),
    "blocks that are not there": (2, {"network_args": ("train_block_indices=7",)}),
    "nothing to train": (2, {"network_args": ("train_block_indices=none",)}),
    "a rule that is no expression": (2, {"rank_rules": ("(=8",)}),
    "a rule that matches nothing": (2, {"lr_rules": ("nothing=1e-3",)}),
    "rules that leave nothing to train": (2, {"lr_rules": ("blocks=0",)}),
    "LoRA+ without up matrices": (2, {"adapter_type": "lokr", "network_args": ("loraplus_lr_ratio=4",)}),
    "DoRA with split projections": (2, {"adapter_type": "dora", "network_args": ("split_qkv=true",)}),
    "norms of what has none": (2, {"adapter_type": "lokr", "scale_weight_norms": 1.0}),
    "a schedule without its rules": (2, {"lr_scheduler": "piecewise_constant"}),
    "rules of no schedule": (2, {"lr_scheduler_args": ("step_rules=1:2",)}),
    "a schedule without its decay": (2, {"lr_scheduler": "warmup_stable_decay"}),
    "too many blocks": (2, {"blocks_to_swap": 99}),
    "an attention kernel that is not here": (2, {"sdpa_backend": "cudnn"}),
    "an unknown subset": (2, {"subsets": {"nobody": {"num_repeats": 2}}}),
    "more repeats than an epoch can hold": (2, {"subsets": {"photos": {"num_repeats": 2**60}}}),
    "a name too long for a file": (2, {"output_name": "n" * 240, "loras_dir": "{folder}/loras"}),
    "an unknown part of the identity": (2, {"allow_changes": ("colour",)}),
    "an adapter that is not there": (3, {"network_weights": "{folder}/nothing.safetensors"}),
    "an adapter that is none": (3, {"network_weights": "{folder}/sd35-medium.safetensors"}),
    "an adapter that is text": (3, {"network_weights": "{folder}/text.txt"}),
    "an adapter of another rank": (3, {"network_weights": "{folder}/runs/finished", "network_dim": 4}),
    "a base adapter that is not there": (3, {"base_weights": ("{folder}/nothing.safetensors",)}),
    "a base adapter for a packed base": (2, {"base_weights": ("{folder}/runs/finished",), "base_dtype": "int8"}),
    "a model that is not there": (3, {"model": "{folder}/nothing.safetensors"}),
    "a model that is text": (3, {"model": "{folder}/text.txt"}),
    "a cache that is not there": (3, {"text": "{folder}/caches/nothing"}),
    "the caches exchanged": (3, {"text": "{folder}/caches/latents", "latents": "{folder}/caches/text"}),
    "prompts that are captions": (3, {"prompts": "{folder}/caches/text"}),
    "a checkpoint that is not there": (3, {"resume": "{folder}/runs/nothing"}),
    "a checkpoint of another run": (4, {"resume": "{folder}/runs/finished"}),
    "a place for adapters that is a file": (7, {"loras_dir": "{folder}/text.txt"}),
    **({"a place where no file can be": (7, {"loras_dir": "/proc/self"})} if Path("/proc/self").is_dir() else {}),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_a_refused_option_leaves_the_finished_run(inputs, kept, wrong):
    (inputs.folder / "text.txt").write_text("words")
    code, options = OPTIONS[wrong]
    options = {name: _filled(value, inputs.folder) for name, value in options.items()}
    assert refused(inputs, **options).exit_code == code


def _filled(value, folder):
    if isinstance(value, tuple):
        return tuple(_filled(item, folder) for item in value)
    if not isinstance(value, str) or "{folder}" not in value:
        return value
    path = folder / value.removeprefix("{folder}/")
    return str(path)


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_weights_that_an_optimizer_cannot_train_are_refused_before_the_base_is_read(inputs, kept, monkeypatch, kind):
    monkeypatch.delattr(setup, "load_base")
    error = refused(inputs, optimizer_type="Muon", adapter_type=kind)
    assert error.exit_code == ExitCode.PARAMETERS and "only supports 2D parameters" in str(error)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def not_a_number(self, forward_pass, velocity):
    return velocity.mean().reshape(1) * float("nan")


TROUBLES = {
    "out of memory": (ExitCode.MEMORY, Objective, "predict", out_of_memory),
    "a bad loss": (ExitCode.INPUT, Objective, "losses", not_a_number),
    "a full disk": (ExitCode.STORAGE, checkpoints, "write_tensors", disk_full),
}


@pytest.mark.parametrize("another", [{}, {"resume": "never"}], ids=["auto", "never"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_before_the_first_checkpoint_leaves_the_finished_run(inputs, kept_run, monkeypatch, trouble, another):
    code, owner, name, fails = TROUBLES[trouble]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        assert refused(inputs, **another).exit_code == code


def test_a_longer_run_that_is_out_of_memory_leaves_the_finished_one(inputs, kept, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "predict", out_of_memory)
        assert refused(inputs, seed=42, max_train_steps=4).exit_code == ExitCode.MEMORY


def test_a_torn_row_leaves_the_finished_run(inputs, kept, tmp_path):
    shutil.copytree(inputs.latents, tmp_path / "latents")
    for segment in (tmp_path / "latents" / "segments").iterdir():
        with open(segment, "r+b") as file:
            file.truncate(segment.stat().st_size - 100)
    assert refused(inputs, latents=tmp_path / "latents").exit_code == ExitCode.INPUT


def test_texts_and_prompts_of_another_width_are_refused(inputs, kept, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tiny_training, "text_row", functools.partial(tiny_training.text_row, context_width=128))
        other = make_inputs(tmp_path, pictures(3))
        prompts = fill_prompts(tmp_path / "prompts", [{"width": 64, "height": 64}])
    message = "that are 128 and 40 wide, and the model reads 96 and 40: encode them with"
    for error in (refused(inputs, text=other.text), refused(inputs, prompts=prompts)):
        assert error.exit_code == ExitCode.INPUT and message in str(error)


def test_what_was_learnt_before_a_bad_loss_is_kept_apart(inputs, kept_run, monkeypatch):
    """The older run keeps its place; the new one's lines can be looked at until the next command."""
    losses, seen = Objective.losses, []

    def fails_at_the_second_step(self, forward_pass, velocity):
        seen.append(forward_pass)
        return losses(self, forward_pass, velocity) * (float("nan") if len(seen) > 1 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", fails_at_the_second_step)
        assert refused(inputs).exit_code == ExitCode.INPUT
    apart = inputs.folder / "runs" / ".sd3pipe" / f"{RUN}.new"
    assert [record["step"] for record in read_records(apart) if record["kind"] == "step"] == [1]
    assert refused(inputs, optimizer_type="AdamX").exit_code == ExitCode.PARAMETERS
    assert not apart.exists()


# the moment at which the new run takes the place


def dies_at(number, inputs, out):
    """Trains another run into `out` in a process that dies before its rename of that number; returns whether it did."""

    def act():
        left = [number]

        def counted(rename):
            def renamed(self, target):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return rename(self, target)

            return renamed

        Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)
        inputs.train(out, **ANOTHER)

    return forked.exit_code(forked.start(act)) == 9


@pytest.mark.slow
def test_a_kill_at_any_rename_leaves_the_older_run_or_both(inputs, tmp_path):
    """With the same command afterwards, the new run is what it would have been, the older one lies beside it."""
    finished = folder_bytes(inputs.folder / "runs" / RUN)
    expected = folder_bytes(inputs.train(tmp_path / "whole", **ANOTHER, output_name="run").folder / "final")
    for number in itertools.count():
        out = tmp_path / str(number) / "run"
        shutil.copytree(inputs.folder / "runs" / RUN, out)
        died = dies_at(number, inputs, out)
        aside = out.with_name("run.1")
        assert folder_bytes(aside if aside.exists() else out) == finished
        new = inputs.train(out, **ANOTHER)
        assert folder_bytes(new.folder / "final") == expected
        assert folder_bytes(aside) == finished
        assert sorted(path.name for path in out.parent.iterdir()) == [".sd3pipe", "run", "run.1"]
        assert not (out.parent / ".sd3pipe" / "run.new").exists()
        assert [path for path in out.parent.rglob("*") if path.name.startswith("tmp-")] == []
        if not died:
            break
    assert number > 10  # renames of one run
