"""Schedule-free optimizers: the averaged weights are the result (Defazio et al. 2024, "The Road Less Scheduled").

While training, the parameters hold y, where gradients are taken; `eval()` turns them into the average x and `train()`
back. Options and their defaults are those of the authors' package.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _ScheduleFree(Optimizer):
    """One update of y and z; a subclass says in which direction and how fast."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        averaging = {"k": 0, "weight_sum": 0.0, "lr_max": 0.0, "train_mode": True}
        super().__init__(params, {**defaults, **averaging})

    def _rate(self, group: dict[str, Any]) -> float:
        """Returns the learning rate of the group's step k."""
        step, warmup_steps = group["k"] + 1, group.get("warmup_steps", 0)
        return group["lr"] * min(1.0, step / warmup_steps) if warmup_steps else group["lr"]

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None, "gradients are computed before step()"
        for group in self.param_groups:
            assert group["train_mode"], "train() must be called before step()"
            rate = self._rate(group)
            group["lr_max"] = max(rate, group["lr_max"])
            weight = (group["k"] + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param]
                if "z" not in state:
                    state["z"] = param.detach().clone()
                direction = self._direction(param.grad, state, group).add(param, alpha=group["weight_decay"])
                param.lerp_(state["z"], share)
                param.add_(direction, alpha=rate * (_beta1(group) * (1 - share) - 1))
                state["z"].sub_(direction, alpha=rate)
            group["k"] += 1

    def eval(self) -> None:
        self._switch(train_mode=False)

    def train(self) -> None:
        self._switch(train_mode=True)

    @torch.no_grad()
    def _switch(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            weight = 1 - _beta1(group) if train_mode else 1 - 1 / _beta1(group)
            for param in (p for p in group["params"] if "z" in self.state[p]):
                param.lerp_(self.state[param]["z"], weight)
            group["train_mode"] = train_mode


class AdamWScheduleFree(_ScheduleFree):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        averaging = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **averaging})

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta2 = group["betas"][1]
        mean = _running_mean(grad, state, beta2)
        return grad / (mean / (1 - beta2 ** (group["k"] + 1))).sqrt().add_(group["eps"])


class RAdamScheduleFree(_ScheduleFree):
    """With RAdam's rectification in place of warm-up (Liu et al. 2019); its first steps only collect statistics."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
    ) -> None:
        averaging = {"r": r, "weight_lr_power": weight_lr_power, "silent_sgd_phase": silent_sgd_phase}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **averaging})

    def _rate(self, group: dict[str, Any]) -> float:
        length, longest = _average_length(group)
        if length <= 4:
            return 0.0 if group["silent_sgd_phase"] else group["lr"]
        rectification = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return group["lr"] * math.sqrt(rectification)

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta2 = group["betas"][1]
        mean = _running_mean(grad, state, beta2)
        if _average_length(group)[0] <= 4:
            return grad
        return grad / (mean / (1 - beta2 ** (group["k"] + 1))).sqrt().add_(group["eps"])


class SGDScheduleFree(_ScheduleFree):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        averaging = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **averaging})

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad


def _beta1(group: dict[str, Any]) -> float:
    return group["betas"][0] if "betas" in group else group["momentum"]


def _running_mean(grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
    if "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(grad)
    return state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def _average_length(group: dict[str, Any]) -> tuple[float, float]:
    """Returns RAdam's rho_t and rho_infinity: how many gradients the second moment averages over."""
    beta2, step = group["betas"][1], group["k"] + 1
    longest = 2 / (1 - beta2) - 1
    return longest - 2 * step * beta2**step / (1 - beta2**step), longest
