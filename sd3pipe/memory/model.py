"""What this room asks of a model: the pieces of its forward pass, its joint blocks, and the arguments that it takes."""

# B batch, L tokens, D width, K modulation width, P pooled width, C latent channels, h w latent pixels

from collections.abc import Collection, Sequence
from typing import NotRequired, Protocol, TypedDict

from torch import Tensor, nn

from sd3pipe.words import KeptActivations

Pair = tuple[Tensor, Tensor]  # of the context and of x


class ModelInputs(TypedDict):
    """The arguments of the model's forward."""

    latents_BChw: Tensor
    timesteps_B: Tensor
    context_BLD: Tensor
    pooled_BP: Tensor
    crop_offset: NotRequired[tuple[int, int] | None]
    skip_blocks: NotRequired[Collection[int]]


class Block(Protocol):
    """What a joint block offers to its runner; `kept` is what `run` keeps for the backward pass."""

    kept: KeptActivations

    def modulation(self, condition_BD: Tensor) -> Pair: ...

    def __call__(
        self, context_BLD: Tensor, x_BLD: Tensor, context_modulation_BK: Tensor, x_modulation_BK: Tensor
    ) -> Pair: ...

    def run(
        self, context_BLD: Tensor, x_BLD: Tensor, context_modulation_BK: Tensor, x_modulation_BK: Tensor
    ) -> Pair: ...

    def run_with_modulation(self, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> Pair: ...


def through_weight(adapter: object) -> bool:
    """Whether an adapter's own gradient goes through the weight of the layer that it stands on."""
    return bool(getattr(adapter, "through_weight", False))


class StreamedModel(Protocol):
    """The MMDiT, as far as its blocks may be run from outside."""

    joint_blocks: Sequence[Block]
    t_embedder: nn.Module
    y_embedder: nn.Module
    block_runner: object  # runs the blocks in the model's stead, if set

    def embed_latents(self, latents_BChw: Tensor, crop_offset: tuple[int, int] | None) -> Tensor: ...

    def embed_context(self, context_BLD: Tensor) -> Tensor: ...

    def condition(self, timesteps_B: Tensor, pooled_BP: Tensor) -> Tensor: ...

    def embed_condition(
        self, t_embedder: nn.Module, y_embedder: nn.Module, timesteps_B: Tensor, pooled_BP: Tensor
    ) -> Tensor: ...

    def run_block(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> Pair: ...

    def finish(self, x_BLD: Tensor, condition_BD: Tensor, latents_BChw: Tensor) -> Tensor: ...
