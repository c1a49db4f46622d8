"""Exactness: a run that is stopped, killed or extended ends in the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.random_adapters import random_adapter
from support.tiny_training import Inputs, Run, equal, make_inputs, pictures, with_other_vae

from sd3pipe.adapters.files import read_adapter, save_adapter
from sd3pipe.errors import InputError, ParameterError, StaleError, Stopped
from sd3pipe.fingerprint import hash_file
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import find_component
from sd3pipe.picture_losses import read_picture_losses
from sd3pipe.training import setup
from sd3pipe.training.feed import load_steps
from sd3pipe.training.step_runner import StepRunner

STEPS = 6


@pytest.fixture(scope="module")
def dataset():
    return pictures(5, captions=("one", "two", "three"), flips=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, dataset) -> Inputs:
    """Five pictures in batches of two: six steps of two micro-batches end in the middle of an epoch."""
    subsets = {"photos": {"caption_dropout_rate": 0.3}}
    folder = tmp_path_factory.mktemp("resume")
    return make_inputs(
        folder, dataset, subsets=subsets, train_batch_size=2, gradient_accumulation_steps=2, network_dropout=0.2
    )


def assert_same_run(first: Run, second: Run, step: int = STEPS) -> None:
    assert equal(first.adapter(step), second.adapter(step))
    assert equal(first.optimizer(step), second.optimizer(step))
    assert first.losses() == second.losses()
    assert first.samples() == second.samples()
    assert read_picture_losses(first.folder) == read_picture_losses(second.folder)
    states = [{**run.state(step), "files": None} for run in (first, second)]
    assert states[0] == states[1]


def stop_after(monkeypatch, step: int) -> None:
    """Makes runs see a wish to stop during the given step."""
    take, seen = StepRunner.step, {"steps": 0}

    def heard(self: StepRunner, *arguments, stop: bool, **named):
        seen["steps"] += 1
        return take(self, *arguments, stop=stop or seen["steps"] == step, **named)

    monkeypatch.setattr(StepRunner, "step", heard)


FAMILIES = {
    "adamw": {},
    "adamw8bit": {"optimizer_type": "AdamW8bit"},
    "adafactor": {"optimizer_type": "Adafactor"},
    "prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0},
    "came": {"optimizer_type": "CAME"},
    "prodigy-plus": {"optimizer_type": "ProdigyPlusScheduleFree", "learning_rate": 1.0},
    "muon": {"optimizer_type": "Muon"},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    "sgd-with-ema": {"optimizer_type": "SGDNesterov", "ema_decay": 0.9},
    "lion-bf16": {"optimizer_type": "Lion", "full_bf16": True},
    "dora-cosine": {"adapter_type": "dora", "lr_scheduler": "cosine", "lr_warmup_steps": 2.0},
    "lokr-decay": {"adapter_type": "lokr", "network_dropout": 0.0, "optimizer_args": ("weight_decay=0.1",)},
    "oft": {"adapter_type": "oft", "network_dropout": 0.0, "network_alpha": 0.05},
    "oftv2-bf16": {"adapter_type": "oftv2", "network_dropout": 0.0, "full_bf16": True},
    "tlora": {"adapter_type": "tlora", "network_args": ("tlora_min_rank=2",)},
    "max-norm-nadam": {"scale_weight_norms": 0.02, "optimizer_type": "NAdam"},
    "fp16": {"mixed_precision": "fp16"},  # the loss scale and its counter are part of the state
}


QUICK = ("adamw", "schedule-free", "lion-bf16", "fp16")


@pytest.mark.long
@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_a_schedule_goes_on_where_it_was(inputs, monkeypatch, scheduler):
    """From a step whose learning rate is neither the whole one nor nothing."""
    options = {"lr_scheduler": scheduler, "max_train_steps": STEPS, "save_every_n_steps": None, "output_name": "rates"}
    whole = inputs.train(f"{scheduler}-whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            inputs.train(f"{scheduler}-parts", **options)
    parts = inputs.train(f"{scheduler}-parts", **options)
    rates = [[record["learning_rate"] for record in run.records()] for run in (whole, parts)]
    assert rates[0] == rates[1] and 0 < rates[0][3] < rates[0][0]
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_stopped_run_goes_on_to_the_same_bits(inputs, monkeypatch, family):
    options = FAMILIES[family] | {"max_train_steps": STEPS, "save_every_n_steps": None}
    package = {"came": "came_pytorch", "prodigy-plus": "prodigyplus"}.get(family)
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed: sd3pipe[optimizers]")
    whole = inputs.train(f"{family}-whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped, match="step 3 of 6"):
            inputs.train(f"{family}-parts", output_name=f"{family}-whole", **options)
    parts = inputs.train(f"{family}-parts", output_name=f"{family}-whole", **options)
    assert parts.steps() == [3, 6]
    assert_same_run(whole, parts)


@pytest.mark.long
def test_worker_processes_change_nothing(inputs):
    alone = inputs.train("workers-0", max_train_steps=4)
    helped = inputs.train("workers-2", max_train_steps=4, max_data_loader_n_workers=2, output_name="workers-0")
    assert_same_run(alone, helped, step=4)


@pytest.mark.long
def test_worker_processes_are_no_more_than_cores(inputs, monkeypatch):
    """As in sd-scripts, whose default of 8 a translated project has; torch would warn of them at each start."""
    asked: list[int] = []

    def load(feed, plans, *, workers, pin_memory):
        asked.append(workers)
        return load_steps(feed, plans, workers=0, pin_memory=pin_memory)

    monkeypatch.setattr(setup, "load_steps", load)
    monkeypatch.setattr(setup, "usable_cores", lambda: 3)
    for number in (2, 8):
        inputs.train(f"of-{number}-workers", max_train_steps=2, max_data_loader_n_workers=number)
    assert asked == [2, 3]


@pytest.mark.long
def test_more_steps_under_a_constant_schedule_continue_exactly(inputs, caplog):
    """Also with a warm-up given as a ratio: it keeps the length that the run began with."""
    caplog.set_level("INFO")
    options = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.5}
    inputs.train("extended", max_train_steps=4, **options)
    extended = inputs.train("extended", max_train_steps=STEPS, **options)
    assert caplog.text.count(f"going on from step 4 of {STEPS}") == 1
    whole = inputs.train("not-extended", max_train_steps=STEPS, output_name="extended", lr_warmup_steps=2.0)
    assert extended.losses() == whole.losses()
    assert equal(extended.optimizer(STEPS), whole.optimizer(STEPS))
    assert not Path(f"{extended.folder}.1").exists()


def test_fewer_steps_take_the_checkpoint_there(inputs):
    longer = inputs.train("shortened", max_train_steps=4)
    expected = longer.adapter(2)
    shorter = inputs.train("shortened", max_train_steps=2)
    assert equal(shorter.adapter(), expected)


def test_a_finished_run_has_nothing_to_do(inputs, capsys):
    run = inputs.train("finished")
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}
    inputs.train("finished")
    assert "nothing to do" in capsys.readouterr().out.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}
    assert run.report()["steps"] == 4
    assert run.report()["loss_last"] == run.losses()[-1]


def test_auto_sets_another_run_aside_and_says_what_differed(inputs, caplog):
    inputs.train("changed", max_train_steps=2)
    inputs.train("changed", max_train_steps=2, learning_rate=5e-3)
    assert "learning_rate was 0.01, is 0.005" in caplog.text
    assert (inputs.folder / "runs" / "changed.1" / "final" / "adapter.safetensors").is_file()


def test_never_starts_afresh(inputs):
    inputs.train("never", max_train_steps=2)
    inputs.train("never", max_train_steps=2, resume="never")
    assert (inputs.folder / "runs" / "never.1").is_dir()


def test_a_path_refuses_another_run_and_names_the_difference(inputs):
    run = inputs.train("refusing", max_train_steps=2)
    with pytest.raises(StaleError, match="seed was 42, is 43") as caught:
        inputs.train("refusing", max_train_steps=4, seed=43, resume=str(run.checkpoint(2)))
    assert caught.value.exit_code == 4


def test_a_path_refuses_caches_of_another_vae(inputs, dataset, tmp_path):
    run = inputs.train("vae-1", max_train_steps=2)
    other = with_other_vae(inputs, tmp_path, dataset)
    with pytest.raises(StaleError, match=r"encoded_with\.vae was vae-1, is vae-2"):
        other.train("vae-2", max_train_steps=4, resume=str(run.folder))


@pytest.mark.long
def test_allowed_changes_go_on_and_are_recorded(inputs):
    run = inputs.train("allowed", max_train_steps=2)
    inputs.train(
        "allowed", max_train_steps=4, learning_rate=1e-3, resume=str(run.folder), allow_changes=("learning_rate",)
    )
    assert run.state(4)["changes"] == [{"step": 2, "learning_rate": [0.01, 0.001]}]
    assert not Path(f"{run.folder}.1").exists()
    with pytest.raises(ParameterError, match="no part of a run's identity"):
        inputs.train("allowed", allow_changes=("colour",))


def test_allowed_changes_of_optimizer_and_warm_up_act(inputs, tmp_path):
    """From the next step on, and still where the run goes on once more."""
    run = inputs.train(tmp_path / "run", max_train_steps=2, lr_warmup_steps=20.0)
    changed = {"optimizer_args": ("weight_decay=0.5", "betas=(0.5,0.6)"), "lr_warmup_steps": 99.0}
    names = (",".join(changed),)
    inputs.train(run.folder, max_train_steps=4, resume=str(run.folder), allow_changes=names, **changed)
    inputs.train(run.folder, max_train_steps=5, **changed)
    rates = [record["learning_rate"] for record in run.records()]
    assert rates == pytest.approx([1e-2 * factor for factor in (1 / 21, 2 / 21, 3 / 100, 4 / 100, 5 / 100)])
    kept = run.state(5)["optimizer"]
    assert (kept["group/0/weight_decay"], kept["group/0/betas"]) == (0.5, [0.5, 0.6])
    inputs.train(
        run.folder, max_train_steps=6, lr_scheduler="constant", lr_warmup_steps=0.0, resume=str(run.folder),
        allow_changes=("lr_scheduler,lr_warmup_steps,optimizer_args",),
    )  # fmt: skip
    assert run.records()[-1]["learning_rate"] == 1e-2
    assert run.state(6)["optimizer"]["group/0/betas"] == [0.9, 0.999]  # what no argument names any more


def test_a_change_that_a_checkpoint_cannot_take_is_named(inputs):
    run = inputs.train("wider", max_train_steps=2)
    with pytest.raises(
        StaleError, match=r"step-00000002 cannot go on with these changes \(network_dim was .*--network-w"
    ):
        inputs.train("wider", network_dim=3, resume=str(run.folder), allow_changes=("network_dim",), max_train_steps=4)
    assert run.state(2)["step"] == 2


@pytest.mark.long
def test_going_back_to_a_checkpoint_sets_the_later_ones_aside(inputs):
    run = inputs.train("back", max_train_steps=4)
    expected = run.adapter(4)
    inputs.train("back", max_train_steps=4, resume=str(run.checkpoint(2)))
    assert (run.folder / "checkpoints" / "step-00000004.superseded").is_dir()
    assert equal(run.adapter(4), expected)


@pytest.mark.long
def test_a_torn_checkpoint_is_named_and_the_one_before_taken(inputs, caplog):
    run = inputs.train("torn", max_train_steps=4)
    expected = run.adapter()
    with open(run.checkpoint(4) / "optimizer.safetensors", "r+b") as file:
        file.truncate(100)
    inputs.train("torn", max_train_steps=4)
    assert "step-00000004 is torn: optimizer.safetensors" in caplog.text
    assert equal(run.adapter(), expected)
    with open(run.checkpoint(2) / "adapter.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"is torn: adapter\.safetensors"):
        inputs.train("torn", resume=str(run.checkpoint(2)))


def test_caches_of_an_older_recipe_version_train_and_say_so(inputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sd3pipe.training.training_data._RECIPE_VERSIONS", {"latents": 2, "text": 1})
    run = inputs.train(tmp_path / "old", max_train_steps=1)
    told = [line for line in caplog.messages if "by version 1 of its recipe, this sd3pipe has version 2" in line]
    assert len(told) == 1 and str(inputs.latents) in told[0]
    assert run.state(1)["identity"]["latents_recipe_version"] == 1


def test_a_run_whose_identity_names_fewer_options_goes_on(inputs, tmp_path):
    run = inputs.train(tmp_path / "run", max_train_steps=2)
    for file in (run.checkpoint(2) / "state.json", run.folder / "final" / "inputs.json"):
        content = json.loads(file.read_text())
        assert content["identity"].pop("latents_recipe_version") == content["identity"].pop("text_recipe_version") == 1
        assert content["identity"].pop("train_layers") == "all"
        content.pop("digest", None)
        file.write_text(json.dumps(content))
    assert inputs.train(tmp_path / "run", max_train_steps=2).report()["steps_now"] == 0
    assert inputs.train(tmp_path / "run", max_train_steps=3).report()["steps_now"] == 1
    assert not (tmp_path / "run.1").exists()


def broken_optimizer(run: Run, change) -> None:
    """Replaces the tensors of a checkpoint and what its state says of their file, as a run without digest would."""
    path = run.checkpoint(2)
    tensors = run.optimizer(2)
    change(tensors, next(name.removesuffix("/exp_avg") for name in tensors if name.endswith("/exp_avg")))
    save_file(tensors, path / "optimizer.safetensors")
    state = run.state(2)
    del state["digest"]
    size, digest = (path / "optimizer.safetensors").stat().st_size, hash_file(path / "optimizer.safetensors")
    state["files"]["optimizer.safetensors"] = {"bytes": size, "blake3": digest}
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, owner: tensors.pop(f"{owner}/exp_avg"),
        lambda tensors, owner: tensors.pop(f"{owner}/step"),
        lambda tensors, owner: tensors.update({f"{owner}/exp_avg": tensors[f"{owner}/exp_avg"].flatten()}),
        lambda tensors, owner: tensors.update({f"{owner}/exp_avg": tensors[f"{owner}/exp_avg"].half()}),
        lambda tensors, owner: tensors.update({"state/elsewhere/exp_avg": torch.zeros(2)}),
        lambda tensors, owner: tensors.update({"group/9/k": torch.zeros(2)}),
        lambda tensors, owner: tensors.pop(next(name for name in tensors if name.startswith("weights/"))),
    ],
)
def test_tensors_that_the_optimizer_does_not_expect_are_refused(inputs, tmp_path, change):
    run = inputs.train(tmp_path / "run", max_train_steps=2)
    broken_optimizer(run, change)
    with pytest.raises(InputError, match="checkpoint"):
        inputs.train(tmp_path / "run", max_train_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["oft", "oftv2", "tlora"])
def test_a_new_run_takes_up_the_kind_of_the_weights_that_it_is_given(inputs, kind):
    plain = {"network_dropout": 0.0, "max_train_steps": 1}
    first = inputs.train(f"{kind}-first", adapter_type=kind, **plain)
    same = inputs.train(f"{kind}-same", adapter_type=kind, network_weights=first.folder, **plain)
    found = inputs.train(f"{kind}-found", dim_from_weights=True, network_weights=first.folder, **plain)
    assert found.losses() == same.losses() and equal(found.adapter(1), same.adapter(1))
    taken = read_adapter(found.checkpoint(1) / "adapter.safetensors").adapter
    assert {delta.algorithm for delta in taken.values()} == {kind}
    merged = inputs.train(f"{kind}-merged", base_weights=(first.folder,), **plain)
    if kind != "tlora":  # whose ranks all act in the base
        assert merged.losses()[0] == pytest.approx(found.losses()[0], rel=1e-3)


@pytest.mark.long
def test_network_weights_start_a_new_run_from_an_adapter(inputs):
    first = inputs.train("teacher", max_train_steps=2)
    pupil = inputs.train("pupil", max_train_steps=2, network_weights=first.folder)
    fresh = inputs.train("no-teacher", max_train_steps=2)
    assert pupil.losses() != fresh.losses()
    wider = inputs.train("wider", max_train_steps=1, network_weights=first.folder, dim_from_weights=True, network_dim=8)
    assert {name: t.shape for name, t in wider.adapter().items()} == {n: t.shape for n, t in first.adapter().items()}
    with safe_open(wider.folder / "final" / "adapter.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("full", {}, "changed by a full change of a form that is not trained"),
        ("dora over loha", {"dim_from_weights": True}, "changed by a DoRA of a form that is not trained"),
        (
            "lokr",
            {"dim_from_weights": True, "scale_weight_norms": 1.0},
            "DoRA alone, not for LoKr",
        ),
        ("loha", {"dim_from_weights": True, "network_args": ("loraplus_lr_ratio=4",)}, "alone, not for LoHa"),
        (
            "loha",
            {"dim_from_weights": True, "network_dropout": 0.1},
            "network_dropout is for .*DoRA alone",
        ),
    ],
)
def test_weights_that_cannot_be_trained_with_these_options_are_refused(inputs, tmp_path, kind, options, message):
    architecture = mmdit_architecture(find_component("mmdit", model=str(inputs.model)))
    save_adapter(tmp_path / "given.safetensors", random_adapter(architecture, kind, embedders=False))
    options = {"network_weights": tmp_path / "given.safetensors", "network_dropout": 0.0, **options}
    with pytest.raises(ParameterError, match=message):
        inputs.train("refused", max_train_steps=1, **options)


def test_the_time_limit_stops_with_code_75(inputs):
    with pytest.raises(Stopped, match="time limit") as caught:
        inputs.train("limited", time_limit="0", max_train_steps=50)
    assert caught.value.exit_code == 75
    assert Run(inputs.folder / "runs" / "limited").steps() == [1]


def child(inputs: Inputs, script: str, *arguments: str, **options) -> subprocess.Popen:
    """Starts a training process of its own."""
    params = inputs.params(**options).model_dump_json()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, params, *arguments], env=environment)


DIES_WITHIN_A_STEP = """
import os, signal, sys
from sd3pipe.commands.train import main
from sd3pipe.params.train import TrainParams
from sd3pipe.training.objective import Objective
predict, left = Objective.predict, int(sys.argv[2])
def deadly(self, forward_pass):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(self, forward_pass)
Objective.predict = deadly
main(TrainParams.model_validate_json(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_killed_within_a_step_goes_on_to_the_same_bits(inputs, family):
    """SIGKILL at the second of a step's two micro-batches, in the middle of an epoch, with worker processes."""
    options = FAMILIES[family] | {"max_train_steps": STEPS, "output_name": "killed"}
    whole = inputs.train(f"{family}-unkilled", **options)
    parts = {"out": f"{family}-killed", "max_data_loader_n_workers": 2, **options}
    assert child(inputs, DIES_WITHIN_A_STEP, "10", **parts).wait(timeout=600) == -signal.SIGKILL
    assert Run(inputs.folder / "runs" / f"{family}-killed").steps() == [2, 4]
    assert_same_run(whole, inputs.train(**parts))


EXITS_LIKE_THE_COMMAND = """
import sys
from sd3pipe import stopping
from sd3pipe.commands.train import main
from sd3pipe.errors import Sd3pipeError
from sd3pipe.params.train import TrainParams
try:
    with stopping.listening():
        main(TrainParams.model_validate_json(sys.argv[1]))
except Sd3pipeError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_sigterm_ends_the_step_saves_and_exits_75(inputs):
    options = {"max_train_steps": 40, "save_every_n_steps": 5, "output_name": "terminated"}
    whole = inputs.train("not-terminated", **options)
    process = child(inputs, EXITS_LIKE_THE_COMMAND, out="terminated", **options)
    while not (inputs.folder / "runs" / "terminated" / "checkpoints" / "step-00000010").is_dir():
        assert process.poll() is None, "ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 75
    parts = inputs.train("terminated", **options)
    assert_same_run(whole, parts, step=40)
    assert json.loads((parts.folder / "final" / "inputs.json").read_text())["steps"] == 40
