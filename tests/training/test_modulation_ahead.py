"""--modulation ahead: the host computes a step's modulation while the step before runs, and changes no bit."""

import pytest
import torch
from support.tiny_training import equal, make_inputs, pictures

from sd3pipe.memory.ahead import AheadModulation
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.training.step_runner import StepRunner
from sd3pipe.training.validation import SIGMAS, Validator

STEPS, ACCUMULATION = 4, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    dataset = [*pictures(3), *pictures(1, subset="kept"), *pictures(1, subset="held out", split="validation")]
    return make_inputs(
        tmp_path_factory.mktemp("ahead"),
        dataset,
        subsets={"kept": {"diff_output_preservation": True}},
        max_train_steps=STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        train_batch_size=2,
        network_dropout=0.1,
        network_args=("x_mod_dim=2",),
        depth=5,
        blocks_to_swap=5,
    )


@pytest.fixture(scope="module")
def streamed(inputs):
    return inputs.train("stream", modulation="stream")


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{}, {"layer_major": True}, pytest.param({"activation_offload": True}, marks=pytest.mark.slow)], ids=str
)
def test_bits_are_those_of_streamed_modulation(inputs, streamed, options):
    ahead = inputs.train("ahead", modulation="ahead", resume="never", **options)
    assert ahead.losses() == streamed.losses()
    assert equal(ahead.adapter(), streamed.adapter())
    assert ahead.report()["memory"]["copied_bytes_per_step"]["measured"] > 0


@pytest.mark.long
def test_the_host_begins_with_a_step_before_the_one_before_it_runs(inputs, monkeypatch):
    events, prepare, step, modulation = [], BlockStreamer.prepare, StepRunner.step, AheadModulation.modulation

    def noted_prepare(self, *tensors):
        events.append("prepare")
        return prepare(self, *tensors)

    def noted_step(self, *arguments, **named):
        events.append("step")
        return step(self, *arguments, **named)

    def prepared_modulation(self, *arguments):
        assert self.pending is not None  # else the host begins only now
        return modulation(self, *arguments)

    monkeypatch.setattr(BlockStreamer, "prepare", noted_prepare)
    monkeypatch.setattr(StepRunner, "step", noted_step)
    monkeypatch.setattr(AheadModulation, "modulation", prepared_modulation)
    monkeypatch.setattr(Validator, "losses", lambda self: torch.zeros(1, len(SIGMAS)))
    inputs.train("order", modulation="ahead", resume="never")
    one_step = ["prepare"] * ACCUMULATION
    assert events == one_step + [*one_step, "step"] * STEPS


@pytest.mark.long
def test_nothing_is_prepared_where_nothing_is_streamed(inputs, monkeypatch):
    monkeypatch.delattr(BlockStreamer, "prepare")
    run = inputs.train("resident", modulation="ahead", blocks_to_swap=0, resume="never")
    assert len(run.losses()) == STEPS
