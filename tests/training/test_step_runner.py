"""A step against its definition: the mean over micro-batches, clipping, weights, and the base model as target."""

from dataclasses import replace

import pytest
import torch
from support.tiny_mmdit import tiny_mmdit
from support.tiny_training import Inputs, Run, make_feed, make_inputs, pictures, plans
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.device import sum_dtype
from sd3pipe.models.pos_embed import ScaledPositions
from sd3pipe.rules.flow import LossRules
from sd3pipe.training import flow, step_runner
from sd3pipe.training.objective import Objective
from sd3pipe.training.step_runner import StepRunner

# plain gradient descent: unlike Adam's, its steps tell how large the gradients were
DESCENT = {"optimizer_type": "SGD", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_train_steps": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("step"), pictures(4, size=(8, 8)))


def ups(run: Run) -> torch.Tensor:
    """Returns how far the up factors have moved from zero."""
    return torch.cat([tensor.flatten() for name, tensor in run.adapter().items() if "lora_up" in name])


def test_accumulated_batches_make_the_step_of_one_large_batch(inputs):
    """All four pictures in one step; sums in another order round differently."""
    large = inputs.train("large", train_batch_size=4, **DESCENT)
    accumulated = inputs.train("accumulated", train_batch_size=1, gradient_accumulation_steps=4, **DESCENT)
    torch.testing.assert_close(ups(accumulated), ups(large), rtol=1e-4, atol=1e-5 * float(ups(large).abs().max()))
    assert accumulated.losses() == pytest.approx(large.losses(), rel=1e-5)


def test_gradients_are_scaled_down_to_the_largest_norm(inputs):
    free = inputs.train("free", train_batch_size=4, **DESCENT)
    norm = free.records()[0]["grad_norm"]
    clipped = inputs.train("clipped", train_batch_size=4, **DESCENT | {"max_grad_norm": norm / 4})
    torch.testing.assert_close(ups(clipped) * 4, ups(free), rtol=1e-4, atol=1e-9)
    # the down factors see no gradient in the first step, for the up factors are zero
    assert float(ups(free).norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_the_norm_is_of_what_is_trained_alone(inputs, precision):
    """Gradients of modules at the rate 0 are no part of it; under fp16 they would stand there times the loss scale."""
    options = DESCENT | {"lr_rules": (r"\.attn\.=0",), "mixed_precision": precision, "train_batch_size": 4}
    free = inputs.train(f"some-{precision}", **options)
    moved, norm = float(ups(free).norm()), free.records()[0]["grad_norm"]
    assert norm == pytest.approx(moved, rel=1e-5)
    clipped = inputs.train(f"some-clipped-{precision}", **options | {"max_grad_norm": norm / 4})
    assert float(ups(clipped).norm()) == pytest.approx(moved / 4, rel=1e-3)


class NoFloat64(TorchDispatchMode):
    """Stands in for a device that has no float64, as a Mac's GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert all(tensor.dtype != torch.float64 for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor))
        return result


@pytest.mark.long
def test_a_step_takes_no_float64_on_a_device_that_has_none(inputs, monkeypatch):
    exact = inputs.train("exact", train_batch_size=2, gradient_accumulation_steps=2, **DESCENT)
    take = StepRunner.step

    def step_on_a_mac(self, *args, **options):
        with NoFloat64():
            return take(self, *args, **options)

    monkeypatch.setattr(StepRunner, "step", step_on_a_mac)
    with pytest.raises(AssertionError):
        inputs.train("refused", train_batch_size=2, gradient_accumulation_steps=2, **DESCENT)
    monkeypatch.setattr(step_runner, "sum_dtype", lambda device: sum_dtype(torch.device("mps")))
    on_a_mac = inputs.train("mac", train_batch_size=2, gradient_accumulation_steps=2, **DESCENT)
    assert torch.equal(ups(on_a_mac), ups(exact)) and on_a_mac.losses() == pytest.approx(exact.losses(), rel=1e-6)


@pytest.mark.parametrize(("scaled", "most"), [(False, 8), (True, 2)])
def test_a_moved_window_stays_in_the_position_table_in_use(inputs, scaled, most):
    """The checkpoint's of 12 x 12 patches, or sd-scripts' scaled one of 6 x 6, for pictures of 4 x 4."""
    mmdit = tiny_mmdit("sd35-medium")
    mmdit.scaled_positions = ScaledPositions([(64, 64)], mmdit.architecture.width) if scaled else None
    feed = make_feed(inputs)
    (plan,) = plans(feed, range(1), batch_size=4)
    batch = replace(feed.batch(plan), crop_draws=(0.0, 0.999, 0.999))  # the share that moves, then down and right
    objective = Objective(mmdit, attach(mmdit, AdapterSpec(rank=2)), LossRules(), position_crop_rate=1.0)
    forward_pass = objective.prepare(batch)
    assert forward_pass.inputs["crop_offset"] == (most, most)
    assert objective.predict(forward_pass).shape == batch.latents.shape


def test_preserved_samples_aim_at_the_base_model_itself(inputs):
    """Differential output preservation: the same input without the adapter is the target; the others keep theirs."""
    mmdit = tiny_mmdit("sd35-medium")
    feed = make_feed(inputs)
    (plan,) = plans(feed, range(1), batch_size=4)
    batch = replace(feed.batch(plan), preserve=torch.tensor([True, False, True, False]))
    with torch.no_grad():
        noisy = flow.add_noise(batch.latents, batch.noise, batch.sigmas)
        base = mmdit(noisy, 1000 * batch.sigmas, batch.context, batch.pooled)
    network = attach(mmdit, AdapterSpec(rank=2, alpha=2.0))
    for layer in network.layers.values():
        torch.nn.init.normal_(layer.up, std=0.3, generator=torch.Generator().manual_seed(1))
    objective = Objective(mmdit, network, LossRules())
    forward_pass = objective.prepare(batch)
    assert forward_pass.target is not None
    assert torch.equal(forward_pass.target[0::2], base[0::2])
    assert torch.equal(forward_pass.target[1::2], (batch.noise - batch.latents)[1::2])
    velocity = objective.predict(forward_pass)
    assert not torch.equal(velocity, base)  # the adapter is back for the answer
    expected = (velocity - forward_pass.target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.losses(forward_pass, velocity), expected)
