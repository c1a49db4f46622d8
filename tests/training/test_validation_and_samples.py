"""What a run does between its steps: validating, drawing, saving, tracking, and answering a bad loss."""

import json
import math
import os
import shutil
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from support.tiny_parts import TINY_VAE, random_tensors, save_single_file
from support.tiny_training import Inputs, equal, fill_prompts, make_inputs, pictures

from sd3pipe import stopping
from sd3pipe.errors import InputError, Stopped
from sd3pipe.metrics import BAND_NAMES, SIGMAS
from sd3pipe.training.objective import Objective
from sd3pipe.training.step_samples import StepSamples
from sd3pipe.training.validation import Validator, mean_and_half_width, verdict

HELD_OUT = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    dataset = [*pictures(5), *(p for p in pictures(5 + HELD_OUT, split="validation") if p.name >= "005")]
    return make_inputs(tmp_path_factory.mktemp("between_steps"), dataset, network_dropout=0.5)


@pytest.fixture(scope="module")
def prompts(inputs):
    settings = [
        {"width": 64, "height": 96, "steps": 2, "seed": 1},
        {"width": 64, "height": 64, "steps": 2, "scale": 1.0},
    ]
    return fill_prompts(inputs.folder / "caches" / "prompts", settings)


@pytest.fixture(scope="module")
def vae(inputs):
    return save_single_file(
        inputs.folder / "vae.safetensors", {"vae": random_tensors(TINY_VAE.shapes(), torch.float32, 1)}
    )


# validation


@pytest.mark.long
def test_validation_measures_held_out_pictures_in_bands(inputs):
    run = inputs.train("validated", validate_every_n_steps=2)
    records = run.records("validation")
    assert [record["step"] for record in records] == [0, 2, 4]
    last = records[-1]
    assert len(last["by_picture"]) == HELD_OUT
    assert last["loss"] == pytest.approx(math.fsum(last["by_picture"]) / HELD_OUT)
    assert tuple(last["bands"]) == BAND_NAMES
    assert math.fsum(last["bands"].values()) / len(SIGMAS) == pytest.approx(last["loss"])
    assert last["ci95"] == pytest.approx(mean_and_half_width(last["by_picture"])[1])
    assert (run.folder / "plots" / "validation.csv").is_file()
    assert json.loads((run.folder / "metrics.json").read_text())["validation_loss"] == last["loss"]


def test_validation_changes_nothing_and_drops_nothing(inputs):
    """Dropout is on in training; two validations of the same weights agree to the bit."""
    often = inputs.train("often", validate_every_n_steps=1)
    seldom = inputs.train("seldom", validate_every_n_steps=0, output_name="often")
    assert often.losses() == seldom.losses()
    assert equal(often.adapter(), seldom.adapter())
    assert [record["step"] for record in seldom.records("validation")] == [0, 4]
    assert often.records("validation")[0]["by_picture"] == seldom.records("validation")[0]["by_picture"]


@pytest.mark.slow
def test_validation_and_samples_mask_a_tloras_ranks_and_change_nothing(inputs, prompts, vae):
    """A held-out loss depends on how many ranks act: with rank 2 and at least 2 all of them do at every level."""
    masked = {"adapter_type": "tlora", "learning_rate": 0.1, "output_name": "tlora"}
    watched = inputs.train(
        "tlora-watched", validate_every_n_steps=1, prompts=prompts, vae=vae, sample_every_n_steps=2, **masked
    )
    alone = inputs.train("tlora-alone", validate_every_n_steps=None, **masked)
    assert watched.losses() == alone.losses() and equal(watched.adapter(), alone.adapter())
    all_ranks = inputs.train("tlora-all", validate_every_n_steps=1, network_args=("tlora_min_rank=2",), **masked)
    first = [run.records("validation")[0]["loss"] for run in (watched, all_ranks)]
    last = [run.records("validation")[-1]["loss"] for run in (watched, all_ranks)]
    assert first[0] == first[1] and last[0] != last[1]


@pytest.mark.long
def test_the_best_checkpoint_is_marked_and_kept(inputs):
    run = inputs.train(
        "best", validate_every_n_steps=1, save_every_n_steps=1, save_last_n_steps=0, max_train_steps=6,
        learning_rate=0.5, lr_scheduler="cosine",
    )  # fmt: skip
    validated = {record["step"]: record["loss"] for record in run.records("validation") if record["step"]}
    best = min(validated, key=lambda step: validated[step])
    assert json.loads((run.folder / "checkpoints" / "best.json").read_text()) == {"step": best, "loss": validated[best]}
    assert run.report()["best_step"] == best
    assert set(run.steps()) == {best, 6}


def test_a_loss_that_is_no_number_is_said_and_never_the_best(inputs, monkeypatch, caplog):
    """One picture's at the first step's validation, one noise level of all pictures' at the second's."""
    losses_at, calls = Objective.losses_at, []

    def broken(self, batch, sigma):
        calls.append(sigma)
        step, call = divmod(len(calls) - 1, HELD_OUT * len(SIGMAS))
        is_broken = (step == 1 and call < len(SIGMAS)) or (step == 2 and sigma == SIGMAS[0])
        return losses_at(self, batch, sigma) * (math.nan if is_broken else 1.0)

    monkeypatch.setattr(Objective, "losses_at", broken)
    run = inputs.train("no-number", validate_every_n_steps=1, max_train_steps=3, train_batch_size=1)
    records = run.records("validation")
    assert [math.isnan(record["loss"]) for record in records] == [False, True, True, False]
    assert [sum(map(math.isnan, record["by_picture"])) for record in records] == [0, 1, HELD_OUT, 0]
    assert "after step 1: the loss of 1 picture of 4 is no number, and never the best: 00" in caplog.text
    assert "after step 2: the loss of 4 pictures of 4 is no number" in caplog.text
    assert run.report()["best_step"] == 3 and "lowest" in run.report()["validation"]
    least = json.loads((run.folder / "metrics.json").read_text())["validation_loss_best"]
    assert least == min(records[0]["loss"], records[3]["loss"])


def test_going_back_before_the_best_step_marks_the_best_so_far(inputs, tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 2.0, 1.0, 5.0])  # of the base, of three steps, and of the third once more
    monkeypatch.setattr(Validator, "losses", lambda self: torch.full((HELD_OUT, len(SIGMAS)), next(losses)))
    options = {"validate_every_n_steps": 1, "save_every_n_steps": 1, "max_train_steps": 3}
    run = inputs.train(tmp_path / "back", **options)
    best = run.folder / "checkpoints" / "best.json"
    assert json.loads(best.read_text()) == {"step": 3, "loss": 1.0}
    inputs.train(run.folder, **options, resume=str(run.checkpoint(2)))
    assert json.loads(best.read_text()) == {"step": 2, "loss": 2.0}
    shutil.copytree(run.checkpoint(2), tmp_path / "elsewhere")
    losses = iter([5.0])
    other = inputs.train(tmp_path / "other", **options, resume=str(tmp_path / "elsewhere"))
    assert not (other.folder / "checkpoints" / "best.json").exists()  # that step's checkpoint is not in this run


@pytest.mark.long
def test_the_best_step_is_saved_though_no_checkpoint_is_due(inputs):
    run = inputs.train("best-between", validate_every_n_steps=1, save_every_n_steps=None, max_train_steps=3)
    assert run.report()["best_step"] in run.steps()


@pytest.mark.long
def test_validation_options_choose_pictures_noise_and_epochs(inputs):
    few = inputs.train("few", max_validation_steps=3).records("validation")[-1]
    assert len(few["by_picture"]) == 3
    seeds = [inputs.train(f"seed-{seed}", validation_seed=seed, max_train_steps=1) for seed in (1, 2)]
    assert seeds[0].losses() == seeds[1].losses()
    assert seeds[0].records("validation")[0]["loss"] != seeds[1].records("validation")[0]["loss"]
    epochs = inputs.train("epochs", validate_every_n_steps=None, validate_every_n_epochs=1, max_train_steps=12)
    assert [record["step"] for record in epochs.records("validation")] == [0, 5, 10, 12]


def test_the_verdict_says_where_over_fitting_begins_and_how_weak_that_is(tmp_path):
    def record(step: int, losses: list[float]) -> str:
        mean, half = mean_and_half_width(losses)
        values = {"kind": "validation", "step": step, "loss": mean, "ci95": half, "bands": {}, "by_picture": losses}
        return json.dumps(values) + "\n"

    noise = [0.0, 0.4, -0.3, 0.2]
    falls, rises = [1.0 + n for n in noise], [1.2 + 1.01 * n for n in noise]
    (tmp_path / "metrics.jsonl").write_text(record(0, rises) + record(5, falls) + record(9, rises))
    assert verdict(tmp_path).startswith("validation loss was lowest at step 5 (1.075")
    assert verdict(tmp_path).endswith("over-fitting begins there (4 held-out pictures: weak evidence)")
    (tmp_path / "metrics.jsonl").write_text(record(0, rises) + record(5, falls) + record(9, falls[1:] + falls[:1]))
    assert "no over-fitting" in verdict(tmp_path) or "chance" in verdict(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(record(5, falls) + record(9, rises[:2]))  # no pairs: means are compared
    assert "has risen by 0.33 since: that may be chance (2 held-out" in verdict(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(record(5, falls) + record(9, [math.nan]))
    assert verdict(tmp_path) == "validation loss is no number at the last step (9): take an earlier checkpoint"
    (tmp_path / "metrics.jsonl").write_text("")
    assert verdict(tmp_path) == ""


def test_intervals_are_students():
    mean, half_width = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.303 / math.sqrt(3))
    assert mean_and_half_width([5.0]) == (5.0, None)


# samples


@pytest.mark.long
def test_samples_are_drawn_on_the_way_and_change_nothing(inputs, prompts, vae):
    run = inputs.train("drawn", prompts=prompts, vae=vae, sample_every_n_steps=2)
    plain = inputs.train("plain", output_name="drawn")
    drawn = {str(path.relative_to(run.folder / "samples")) for path in (run.folder / "samples").rglob("*.png")}
    steps = {f"step-{step:08d}/{name}.png" for step in (0, 2, 4) for name in ("000", "001")}
    assert drawn == steps | {"000.png", "001.png"}
    assert run.losses() == plain.losses()
    assert equal(run.adapter(), plain.adapter())


@pytest.mark.long
def test_without_a_vae_latents_are_kept(inputs, prompts, caplog):
    run = inputs.train(
        "kept", prompts=prompts, sample_at_first=False, sample_every_n_steps=None, sample_every_n_epochs=1,
        max_train_steps=6,
    )  # fmt: skip
    assert "no VAE at hand" in caplog.text
    folders = sorted(path.name for path in (run.folder / "samples").iterdir())
    assert folders == ["step-00000005", "step-00000006"]
    first, last = (next(iter(load_file(run.folder / "samples" / f / "000.safetensors").values())) for f in folders)
    assert first.shape[-2:] == (12, 8)
    assert not torch.equal(first, last)


@pytest.mark.long
def test_the_turbo_variant_draws_otherwise(inputs, tmp_path):
    prompts = fill_prompts(tmp_path / "prompts", [{"width": 64, "height": 64}])
    options = {"prompts": prompts, "max_train_steps": 1, "sample_every_n_steps": 1, "sample_at_first": False}
    runs = [inputs.train("turbo", variant="sd35-large-turbo", **options), inputs.train("medium", **options)]
    files = [run.folder / "samples" / "step-00000001" / "000.safetensors" for run in runs]
    latents = [next(iter(load_file(file).values())) for file in files]
    assert not torch.equal(*latents)


@pytest.mark.long
def test_missing_prompts_cost_a_warning(inputs, caplog):
    inputs.train("promptless", prompts=inputs.folder / "nowhere", max_train_steps=1)
    assert "no samples are drawn" in caplog.text


# saving


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "adapters", "states"),
    [
        ({}, [1, 2, 3, 4, 5, 6], [5, 6]),
        ({"save_last_n_steps": 2}, [4, 5, 6], [5, 6]),
        ({"save_last_n_steps_state": 0}, [1, 2, 3, 4, 5, 6], [6]),
        ({"save_last_n_epochs": 1}, [6], [6]),
        ({"save_last_n_epochs_state": 2}, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ({"save_every_n_steps": None, "save_every_n_epochs": 1}, [5, 6], [5, 6]),
        ({"save_every_n_steps": 4}, [4, 6], [4, 6]),
    ],
)
def test_old_checkpoints_go_as_asked(inputs, options, adapters, states):
    options = {"save_every_n_steps": 1, "max_train_steps": 6} | options
    name = "-".join(f"{option}-{value}" for option, value in options.items())
    run = inputs.train(name, validate_every_n_steps=None, max_validation_steps=1, **options)
    best = run.report()["best_step"]
    assert sorted({*run.steps(), best}) == sorted({*adapters, best})
    with_state = [step for step in run.steps() if (run.checkpoint(step) / "optimizer.safetensors").is_file()]
    assert set(states) <= set(with_state) | {best}
    assert [step for step in with_state if step != best] == [step for step in states if step != best]


@pytest.mark.long
def test_save_precision_halves_the_adapter_and_resume_stays_exact(inputs):
    options = {"save_precision": "fp16", "max_train_steps": 4}
    whole = inputs.train("half", **options)
    inputs.train("halves", output_name="half", **options | {"max_train_steps": 2})
    halves = inputs.train("halves", output_name="half", **options)
    tensors = whole.adapter()
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {torch.float16}
    assert equal(tensors, halves.adapter())
    assert equal(whole.optimizer(4), halves.optimizer(4))


# trackers


@pytest.mark.long
def test_tensorboard_receives_the_steps(inputs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = inputs.folder / "boards"
    run = inputs.train("tracked", log_with="tensorboard", logging_dir=folder, log_tracker_name="project")
    events = EventAccumulator(str(folder / "project"))
    events.Reload()
    losses = [event.value for event in events.Scalars("step/loss")]
    assert losses == pytest.approx(run.losses())
    assert "validation/loss" in events.Tags()["scalars"]


@pytest.mark.slow
def test_wandb_records_offline(inputs, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = inputs.train("offline", log_with="wandb", wandb_run_name="tuesday", max_train_steps=2)
    (record,) = (run.folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0
    assert b"step/loss" in record.read_bytes()


@pytest.mark.long
def test_wandb_is_asked_for_by_name(inputs, monkeypatch):
    started = {}

    class FakeAccelerator:
        def __init__(self, **options: object) -> None:
            started["log_with"] = options["log_with"]

        def init_trackers(self, name: str, config: dict, init_kwargs: dict) -> None:
            started.update(name=name, run=init_kwargs["wandb"]["name"], seed=config["seed"])

        def log(self, values: dict, step: int) -> None:
            started.setdefault("steps", []).append(step)

        trackers: ClassVar = [SimpleNamespace(finish=lambda: started.update(ended=True))]

    monkeypatch.setattr("accelerate.Accelerator", FakeAccelerator)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    inputs.train("weighed-and-biased", log_with="wandb", wandb_run_name="tuesday", max_train_steps=2)
    expected = {"log_with": ["wandb"], "name": "weighed-and-biased", "run": "tuesday", "seed": 42, "ended": True}
    assert {name: started[name] for name in expected} == expected
    assert {1, 2} <= set(started["steps"])


@pytest.mark.long
def test_trackio_keeps_the_steps_with_the_run(inputs, monkeypatch):
    """A stand-in for the package, beside accelerate's own tracker: 0.43 cannot be installed with the tests' pillow."""
    kept = SimpleNamespace(steps=[], ended=False)
    run = SimpleNamespace(
        log=lambda values, step: kept.steps.append((step, values["step/loss"]) if "step/loss" in values else None),
        finish=lambda: setattr(kept, "ended", True),
    )

    def init(project: str) -> SimpleNamespace:
        kept.project, kept.folder = project, os.environ["TRACKIO_DIR"]
        return run

    stand_in = ModuleType("trackio")
    stand_in.init, stand_in.config = init, SimpleNamespace(update=lambda *_, **__: None)
    stand_in.__spec__ = ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    monkeypatch.setattr("accelerate.tracking.is_trackio_available", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    trained = inputs.train("kept", log_with="trackio", max_train_steps=2)
    assert kept.project == "kept" and kept.folder == str(trained.folder / "logs" / "trackio") and kept.ended
    assert [loss for step, loss in filter(None, kept.steps)] == pytest.approx(trained.losses())


# bad losses


BAD_STEP = 3  # counted from 0


def poison(monkeypatch, value: float) -> None:
    """Multiplies the loss of one batch of the first epoch."""
    original = Objective.losses

    def losses(self, forward_pass, velocity):
        found = original(self, forward_pass, velocity)
        plan = forward_pass.batch.plan
        return found * value if (plan.epoch, plan.index) == (0, BAD_STEP) else found

    monkeypatch.setattr(Objective, "losses", losses)


@pytest.mark.parametrize(("value", "options"), [(math.nan, {}), (100.0, {"loss_spike_factor": 5.0})])
def test_a_bad_loss_stops_and_names_its_pictures(inputs, monkeypatch, value, options):
    poison(monkeypatch, value)
    with pytest.raises(InputError, match=r"^step 4: the loss is .*; its pictures: 00\d\.png\. Nothing was learnt"):
        inputs.train(f"bad-{value}", max_train_steps=10, **options)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_rollback_leaves_the_step_out_and_resumes_exactly(inputs, monkeypatch, caplog, precision):
    poison(monkeypatch, math.nan)
    options = {"on_bad_loss": "rollback", "max_train_steps": 8, "save_every_n_steps": 2, "mixed_precision": precision}
    run = inputs.train(f"rolled-{precision}", **options)
    assert run.report()["skipped_steps"] == [BAD_STEP]
    assert [record["step"] for record in run.records()] == [1, 2, 3, 5, 6, 7, 8]
    assert all(math.isfinite(loss) for loss in run.losses())
    assert [(event["step"], event["bad_step"]) for event in run.records("event")] == [(2, 4)]
    assert "Going on from step 2 without it" in caplog.text
    parts = f"parts-{precision}"
    inputs.train(parts, output_name=f"rolled-{precision}", **options | {"max_train_steps": 6})
    parts = inputs.train(parts, output_name=f"rolled-{precision}", **options)
    assert equal(parts.adapter(), run.adapter())


# what train leaves alone


@pytest.mark.long
def test_train_imports_neither_text_encoders_nor_pillow_nor_the_compiler(inputs):
    import subprocess

    params = inputs.params("imports", max_train_steps=1, gradient_checkpointing=True).model_dump_json()
    code = (
        "import sys; from sd3pipe.commands.train import main; from sd3pipe.params.train import TrainParams;"
        "main(TrainParams.model_validate_json(sys.argv[1]));"
        "heavy = {'transformers', 'PIL', 'diffusers', 'peft', 'tokenizers', 'accelerate', 'torch._dynamo'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, params], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# stopping


def asked_at(monkeypatch, where: type, name: str, call: int) -> None:
    """Makes the process hear SIGTERM when a method is called the given number of times."""
    method, calls = getattr(where, name), []

    def told(self, *arguments, **named):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return method(self, *arguments, **named)

    monkeypatch.setattr(where, name, told)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "name", "call"),
    [
        (Objective, "losses_at", 2),  # of the validation before the first step
        (StepSamples, "_draw", 2),  # of the samples before the first step: the first picture is there by then
        (Objective, "predict", 2),  # in the second step, after which both are due
        (StepSamples, "_draw", 4),  # after the second step: what is left is owed
        (StepSamples, "_draw", 6),  # after the last step
    ],
)
def test_what_a_stopped_run_owes_is_done_when_it_goes_on(inputs, prompts, monkeypatch, where, name, call):
    options = {"prompts": prompts, "sample_every_n_steps": 2, "validate_every_n_steps": 2, "output_name": "owed"}
    whole = inputs.train("not-stopped", **options)
    with monkeypatch.context() as patch, stopping.listening(), pytest.raises(Stopped):
        asked_at(patch, where, name, call)
        inputs.train("stopped", resume="never", **options)
    parts = inputs.train("stopped", **options)
    assert equal(parts.adapter(), whole.adapter())
    assert parts.records("validation") == whole.records("validation")
    assert [record["step"] for record in parts.records()] == [1, 2, 3, 4]
    states = [{**run.state(4), "files": None} for run in (parts, whole)]
    assert states[0] == states[1]
    drawn = [{path.relative_to(run.folder) for path in run.folder.glob("samples/*/*")} for run in (parts, whole)]
    assert drawn[0] == drawn[1]
