"""Recomputing in the backward pass what the forward pass does not keep, by torch's (selective) checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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

    With `keep_attention`, what attention operators return is kept, too: a quarter of the time for a 24th of the bytes.
    """
    # nothing in a block draws from torch's generators: dropout goes by counters
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep_attention:
        options["context_fn"] = _attention_contexts
    return checkpoint(function, *inputs, **options)


def _attention_contexts() -> Any:
    return create_selective_checkpoint_contexts(list(ATTENTION_OPERATORS))
