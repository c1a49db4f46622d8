"""Recomputed layers give the bits of layers that keep their activations; what autograd saves goes where it is sent."""

import weakref

import pytest
import torch
from torch import nn

from sd3pipe.models.recomputation import recomputed


class Layers(nn.Module):
    """Frozen and trained layers, two inputs and two outputs, as a joint block has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        for layer in self.layers[1:3]:
            layer.requires_grad_(False)
        self.calls = 0

    def forward(self, context, x):
        self.calls += 1
        middle = nn.functional.gelu(self.layers[0](context)) * self.layers[1](x)
        return self.layers[2](middle).softmax(-1), self.layers[3](middle + context)


def gradients(layers, call, trained):
    layers.zero_grad(set_to_none=True)
    context, x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    inputs = [tensor.requires_grad_(needs) for tensor, needs in zip((context, x), trained, strict=True)]
    first, second = call(*inputs)
    (first * second).float().sum().backward()
    found = [tensor.grad for tensor in (*inputs, *layers.parameters())]
    return [first.detach(), second.detach(), *(tensor for tensor in found if tensor is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [(False, False), (True, False), (True, True)])
def test_recomputed_layers_give_the_same_bits(autocast, trained):
    layers = Layers()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = gradients(layers, layers, trained)
        found = gradients(layers, lambda *inputs: recomputed(layers, *inputs), trained)
    assert layers.calls == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_nothing_is_computed_again_where_no_gradient_is_asked_for():
    layers = Layers()
    with torch.no_grad():
        first, _ = recomputed(layers, torch.ones(1, 8), torch.ones(1, 8))
    assert not first.requires_grad and layers.calls == 1


def test_of_what_autograd_saves_only_the_inputs_remain():
    seen = []

    def run(context, x):
        middle = (context * 2).exp()
        seen.append(weakref.ref(middle))
        return middle * x, middle + x

    context = torch.ones(3, requires_grad=True)
    sent = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sent.append(tensor) or tensor, lambda tensor: tensor):
        first, second = recomputed(run, context, torch.full((3,), 2.0))
    assert seen[0]() is None and len(sent) == 2 and sent[0] is context
    (first + second).sum().backward()
    assert len(seen) == 2 and torch.allclose(context.grad, 6 * torch.exp(torch.tensor(2.0)).expand(3))
