"""Adafactor (Shazeer and Stern, arXiv:1804.04235) with the arguments and sums of transformers', which sd-scripts uses.

torch.optim has one, too, but it always scales steps by the size of the weights, of which a fresh adapter's are zero.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

_LARGEST_RELATIVE_STEP = 1e-2
_WARM_UP = 1e-6  # relative steps rise by this much per step with warmup_init


class Adafactor(Optimizer):
    """Second moments of matrices are kept as a row and a column, so that the state is small.

    Unlike transformers', `relative_step` and `scale_parameter` are off unless asked for: steps are the learning rate's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
    ) -> None:
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True needs relative_step=True")
        defaults = {
            "lr": lr,
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        assert closure is None, "a step has no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        size = _step_size(parameter, group, state["step"])
        decay = 1.0 - state["step"] ** group["decay_rate"]
        change = gradient * _inverse_root(gradient.square() + group["eps"][0], decay, state)
        change = change / (_rms(change) / group["clip_threshold"]).clamp(min=1.0) * size
        if group["beta1"] is not None:
            momentum = state.setdefault("exp_avg", torch.zeros_like(change))
            change = momentum.mul_(group["beta1"]).add_(change, alpha=1.0 - group["beta1"])
        if group["weight_decay"]:
            parameter.sub_(parameter * size * group["weight_decay"])
        parameter.sub_(change)


def _step_size(parameter: Tensor, group: dict[str, Any], step: int) -> Tensor | float:
    size = group["lr"]
    if group["relative_step"]:
        largest = _WARM_UP * step if group["warmup_init"] else _LARGEST_RELATIVE_STEP
        size = min(largest, 1.0 / math.sqrt(step))
    return _rms(parameter).clamp(min=group["eps"][1]) * size if group["scale_parameter"] else size


def _inverse_root(squares: Tensor, decay: float, state: dict[str, Any]) -> Tensor:
    """Returns 1 / sqrt of the running mean of the squares, which matrices keep as its row and column means."""
    if squares.ndim < 2:
        return _running(state, "exp_avg_sq", squares, decay).rsqrt()
    row = _running(state, "exp_avg_sq_row", squares.mean(dim=-1), decay)
    column = _running(state, "exp_avg_sq_col", squares.mean(dim=-2), decay)
    return (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()


def _running(state: dict[str, Any], name: str, values: Tensor, decay: float) -> Tensor:
    return state.setdefault(name, torch.zeros_like(values)).mul_(decay).add_(values, alpha=1.0 - decay)


def _rms(values: Tensor) -> Tensor:
    return values.norm() / math.sqrt(values.numel())
