"""Adafactor against transformers', which sd-scripts uses."""

import pytest
import torch
from transformers.optimization import Adafactor as Oracle

from sd3pipe.errors import ParameterError
from sd3pipe.training.adafactor import Adafactor
from sd3pipe.training.optimizers import make_optimizer

CASES = {
    "as sd-scripts' users set it": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    "scaled by the weights": {"relative_step": False, "scale_parameter": True},
    "relative steps": {"relative_step": True, "scale_parameter": True},
    "relative steps that warm up": {"relative_step": True, "scale_parameter": True, "warmup_init": True},
    "momentum and decay": {
        "relative_step": False, "scale_parameter": False, "beta1": 0.9, "weight_decay": 0.1, "clip_threshold": 0.5,
        "decay_rate": -0.6,
    },
}  # fmt: skip


def weights() -> list[torch.nn.Parameter]:
    """A matrix, a stack of matrices as split_qkv has it, a vector, and a matrix of zeros as fresh adapters have."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (3, 5, 2), (7,), (4, 8))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value * (number < 3)) for number, value in enumerate(values)]


def descend(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_of_transformers(case):
    args, ours, theirs = CASES[case], weights(), weights()
    rate = None if args["relative_step"] else 0.01
    descend(make_optimizer("Adafactor", [{"params": ours, "lr": 0.01}], args), ours)
    descend(Oracle(theirs, lr=rate, **args), theirs)
    for mine, wanted, start in zip(ours, theirs, weights(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-8)  # eight steps in float32
        assert not torch.equal(mine, start)


def test_without_arguments_steps_are_the_learning_rates():
    (parameter,) = (torch.nn.Parameter(torch.zeros(4, 8)),)
    parameter.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    Adafactor([parameter], lr=0.01).step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=0.2)


def test_relative_steps_say_that_the_learning_rate_is_not_used(caplog):
    make_optimizer("Adafactor", [{"params": weights(), "lr": 0.01}], {"relative_step": True})
    assert "learning_rate, lr_scheduler and lr_rules have no effect" in caplog.text
    with pytest.raises(ParameterError, match="warmup_init=True needs relative_step=True"):
        make_optimizer("Adafactor", [{"params": weights(), "lr": 0.01}], {"warmup_init": True})
