"""Lion: the sign of interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None, "gradients are computed before step()"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * state["exp_avg"].lerp(param.grad, 1 - beta1).sign())
                state["exp_avg"].lerp_(param.grad, 1 - beta2)
