"""Recomputing in the backward pass what the forward pass does not keep.

Torch's checkpoints import the whole compiler at their first call (1.2 s, 70 MB), to keep it out. They are left to where
the compiler is at work, which knows them, and to keeping more than the inputs.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Every operator that scaled_dot_product_attention may become, but "math", which is a product like all others.
_ATTENTION_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
ATTENTION_OPERATORS = tuple(
    getattr(torch.ops.aten, name).default for name in _ATTENTION_NAMES if hasattr(torch.ops.aten, name)
)


def recomputed(function: Callable[..., Any], *inputs: Tensor, keep_attention: bool = False) -> Any:
    """Returns function(*inputs), and keeps the inputs for the backward pass, which computes the rest again.

    The inputs are saved as autograd saves tensors: hooks around this call see them. With `keep_attention`, what
    attention operators return is kept, too: a quarter of the time for a 24th of the bytes. The backward pass can be
    taken once.
    """
    # nothing in a block draws from torch's generators: dropout goes by counters
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep_attention:
        contexts = functools.partial(create_selective_checkpoint_contexts, list(ATTENTION_OPERATORS))
        return checkpoint(function, *inputs, **options, context_fn=contexts)
    if torch.compiler.is_compiling():
        return checkpoint(function, *inputs, **options)
    node = _Inputs.apply(torch.empty(0, requires_grad=True), *inputs).grad_fn
    if node is None:  # no gradient is asked for
        return function(*inputs)
    passage = _Passage(function, node, inputs[0].device.type)
    with saved_tensors_hooks(passage.number, passage.tensor):
        return function(*inputs)


class _Inputs(torch.autograd.Function):
    """A node of the graph that leads nowhere and holds the inputs."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.need_gradients = [tensor.requires_grad for tensor in inputs]
        return trained.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("nothing depends on this node")


class _Recomputed(Exception):
    """All that was asked for is computed again; what would come after is not needed."""


class _Passage:
    """One call: what autograd saved in it bears numbers until the backward pass asks for the first of them."""

    def __init__(self, function: Callable[..., Any], node: Any, device: str) -> None:
        self._function, self._node = function, node
        self._saved = 0
        self._tensors: dict[int, Tensor] = {}
        self._contexts = [
            torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for kind in sorted({device, "cpu"})
        ]

    def number(self, tensor: Tensor) -> int:
        self._saved += 1
        return self._saved - 1

    def tensor(self, number: int) -> Tensor:
        if number in self._tensors:
            return self._tensors.pop(number)
        numbers = itertools.count()

        def keep(tensor: Tensor) -> Tensor:
            place = next(numbers)
            self._tensors[place] = tensor.detach()
            if place == self._saved - 1:
                raise _Recomputed
            return self._tensors[place]

        saved = zip(self._node.saved_tensors, self._node.need_gradients, strict=True)
        inputs = [tensor.detach().requires_grad_(needs_gradient) for tensor, needs_gradient in saved]
        with contextlib.ExitStack() as stack:
            for context in (torch.enable_grad(), *self._contexts, saved_tensors_hooks(keep, _unasked)):
                stack.enter_context(context)
            with contextlib.suppress(_Recomputed):
                self._function(*inputs)
        return self._tensors.pop(number)


def _unasked(tensor: Tensor) -> Tensor:
    raise AssertionError("the graph of a recomputation is not walked")
