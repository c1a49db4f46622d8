"""Gradients of one batch by several threads, each of which takes a part of it: small layers share no cores otherwise.

The number of threads is fixed, so that the bits of what is trained do not depend on the number of cores.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

THREADS = 2

Part = tuple[Tensor, ...]


class Shards:
    """A module and copies that share its weights, one for each thread.

    part_loss  gives the loss of a part of a batch by one of the copies
    """

    def __init__(self, module: nn.Module, part_loss: Callable[[nn.Module, Part], Tensor]) -> None:
        self._copies = [module, *(_sharing_weights(module) for _ in range(THREADS - 1))]
        self._part_loss = part_loss
        self._pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, parts: Sequence[Part]) -> float:
        """Leaves the gradient of the parts' mean loss in the module, and returns that loss."""
        losses = list(self._pool.map(self._backward_part, self._copies, parts))
        first, *others = ([parameter.grad for parameter in _trained(module)] for module in self._copies[: len(parts)])
        for mean, *gradients in zip(first, *others, strict=True):
            for gradient in gradients:
                mean.add_(gradient)
            mean.div_(len(parts))
        return sum(losses) / len(parts)

    def _backward_part(self, module: nn.Module, part: Part) -> float:
        for parameter in _trained(module):
            parameter.grad = None
        loss = self._part_loss(module, part)
        loss.backward()
        return loss.item()


class Average:
    """A running average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay, self._steps = module, decay, 0
        self._average = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights, faster in the first steps."""
        self._steps += 1
        share = 1 - min(self._decay, self._steps / (self._steps + 9))
        torch._foreach_lerp_(self._average, list(self._module.parameters()), share)

    @torch.no_grad()
    def take_over(self) -> None:
        """Puts the average in the place of the weights."""
        for parameter, average in zip(self._module.parameters(), self._average, strict=True):
            parameter.copy_(average)


def _sharing_weights(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    for own, shared in zip(other.parameters(), module.parameters(), strict=True):
        own.data = shared.data
    return other


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
