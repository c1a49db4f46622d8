"""Adafactor with the options of the version that LoRA trainers use (Shazeer and Stern 2018, algorithms 4 and 5).

Options and their defaults are those of fairseq and transformers: `relative_step` chooses the learning rate by itself
(and excludes `lr`), `scale_parameter` makes it relative to each tensor's root mean square.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sd3pipe.errors import ParameterError


class Adafactor(Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if warmup_init and not relative_step:
            raise ParameterError("optimizer_args: Adafactor's warmup_init=True needs relative_step=True")
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": eps,
                "clip_threshold": clip_threshold,
                "decay_rate": decay_rate,
                "beta1": beta1,
                "weight_decay": weight_decay,
                "scale_parameter": scale_parameter,
                "relative_step": relative_step,
                "warmup_init": warmup_init,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None, "gradients are computed before step()"
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                self._update(param, self.state[param], group)

    def _update(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert param.grad is not None
        state["step"] = state.get("step", 0) + 1
        rate = _rate(param, state["step"], group)
        beta2 = 1 - state["step"] ** group["decay_rate"]
        update = param.grad * _inverse_rms(state, param.grad.square() + group["eps"][0], beta2)
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(rate)
        if group["beta1"] is not None:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param)
            update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        param.sub_(param * (group["weight_decay"] * rate))
        param.sub_(update)


def _inverse_rms(state: dict[str, Any], squares: Tensor, beta2: float) -> Tensor:
    """Returns 1 / sqrt(running mean of the squares), which is kept as row and column means for matrices."""
    if squares.ndim < 2:
        mean = state.setdefault("exp_avg_sq", torch.zeros_like(squares)).lerp_(squares, 1 - beta2)
        return mean.rsqrt()
    rows = state.setdefault("exp_avg_sq_row", torch.zeros_like(squares[..., 0]))
    columns = state.setdefault("exp_avg_sq_col", torch.zeros_like(squares[..., 0, :]))
    rows.lerp_(squares.mean(dim=-1), 1 - beta2)
    columns.lerp_(squares.mean(dim=-2), 1 - beta2)
    return (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


def _rate(param: Tensor, step: int, group: dict[str, Any]) -> Tensor | float:
    rate = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
    return _rms(param).clamp(min=group["eps"][1]) * rate if group["scale_parameter"] else rate


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
