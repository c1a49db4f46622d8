"""Prodigy: AdamW whose step size is estimated on the way (Mishchenko and Defazio 2023, algorithm 4)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Prodigy(Optimizer):
    """Options and defaults are those of the authors' package; leave `lr` at 1. All groups share one estimate `d`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
            "d": d0,
            "d_max": d0,
            "d_numerator": 0.0,
            "k": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None, "gradients are computed before step()"
        shared = self.param_groups[0]
        beta1, beta2 = shared["betas"]
        beta3 = shared["beta3"] if shared["beta3"] is not None else math.sqrt(beta2)
        rate = max(group["lr"] for group in self.param_groups)
        if shared["use_bias_correction"]:
            rate *= math.sqrt(1 - beta2 ** (shared["k"] + 1)) / (1 - beta1 ** (shared["k"] + 1))
        numerator, denominator = self._accumulate(shared["d"] * rate, beta3)
        if denominator == 0:
            return
        self._estimate(shared, numerator, denominator)
        self._move(rate)

    def _accumulate(self, step_size: float, beta3: float) -> tuple[float, float]:
        """Updates the moments and returns the numerator and denominator of the new estimate of d."""
        shared = self.param_groups[0]
        d, d0 = shared["d"], shared["d0"]
        gains, sums = [], []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[param], param.grad
                if not state:
                    state["start"] = param.detach().clone()
                    for name in ("sum", "exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(param)
                if group["lr"] == 0:
                    continue
                gains.append(torch.dot(grad.flatten(), (state["start"] - param).flatten()))
                state["exp_avg"].mul_(beta1).add_(grad, alpha=d * (1 - beta1))
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=d * d * (1 - beta2))
                state["sum"].mul_(beta3).add_(grad, alpha=d / d0 * (d if group["safeguard_warmup"] else step_size))
                sums.append(state["sum"].abs().sum())
        gain, denominator = (_total(gains), _total(sums))
        return shared["d_numerator"] * beta3 + d / d0 * step_size * gain, denominator

    def _estimate(self, shared: dict[str, Any], numerator: float, denominator: float) -> None:
        estimate = shared["d_coef"] * numerator / denominator
        d = max(shared["d"], estimate) if shared["d"] == shared["d0"] else shared["d"]
        d_max = max(shared["d_max"], estimate)
        d = min(d_max, d * shared["growth_rate"])
        for group in self.param_groups:
            group.update(d=d, d_max=d_max, d_numerator=numerator, d_previous=shared["d"], k=group["k"] + 1)

    def _move(self, rate: float) -> None:
        for group in self.param_groups:
            step_size = group["d_previous"] * rate
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param]
                denominator = state["exp_avg_sq"].sqrt().add_(group["d"] * group["eps"])
                if group["decouple"]:
                    param.sub_(param, alpha=group["weight_decay"] * step_size)
                param.addcdiv_(state["exp_avg"], denominator, value=-step_size)


def _total(values: list[Tensor]) -> float:
    return float(torch.stack(values).sum()) if values else 0.0
