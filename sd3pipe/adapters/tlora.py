"""T-LoRA (arXiv:2507.05964): a LoRA of which fewer ranks act the more noise a sample has.

Its vanilla form: the authors' orthogonal start (Ortho-LoRA, with trained singular values) is left out.
"""

# B batch, R rank

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, on_cpu
from sd3pipe.adapters.lora import LoRA, LoRADelta
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.errors import ParameterError
from sd3pipe.rules.flow import NUM_TIMESTEPS

_MIN_RANK_KEY = "sd3pipe_tlora_min_rank"


class TLoRA(LoRA):
    """A LoRA whose first r(t) ranks act at timestep t, of each sample by its own: in training and in drawing alike."""

    follows_noise = True

    def __init__(self, setup: LayerSetup, min_rank: int) -> None:
        super().__init__(setup)
        self.min_rank = min_rank

    def drop_ranks(self, low: Tensor) -> Tensor:
        timesteps_B = self.setup.batch.timesteps
        assert timesteps_B is not None, "a T-LoRA needs the timesteps, which the model's forward or set_timesteps gives"
        mask_BR = rank_mask(timesteps_B, self.setup.rank, self.min_rank).to(low.dtype)
        return super().drop_ranks(low * mask_BR.view(len(low), *(1,) * (low.ndim - 2), -1))

    def delta(self) -> "TLoRADelta":
        down, up = on_cpu(self.down), on_cpu(self.up)
        return TLoRADelta(down=down, up=up, alpha=self.setup.alpha, min_rank=self.min_rank)


def rank_mask(timesteps_B: Tensor, rank: int, min_rank: int) -> Tensor:
    """Returns which ranks act [B, R]: the first r(t) = floor((T - t) / T (R - r_min)) + r_min, its section 3."""
    lowest = min(rank, min_rank)
    more_B = (NUM_TIMESTEPS - timesteps_B.double()) * (rank - lowest) / NUM_TIMESTEPS
    active_B = more_B.floor() + lowest
    return torch.arange(rank, device=timesteps_B.device) < active_B[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TLoRADelta(LoRADelta):
    """A LoRA with the fewest ranks that act. What it does at a noise level is none of the weights' business.

    So whoever takes it for a change of weights has the LoRA of all ranks: that is what merging and other programs do.
    """

    algorithm: ClassVar[str] = "tlora"
    title: ClassVar[str] = "T-LoRA"
    options: ClassVar[frozenset[str]] = LoRADelta.options - {"split_qkv"} | {"tlora_min_rank"}
    layer_class: ClassVar[type[AdapterLayer]] = TLoRA
    note_keys: ClassVar[frozenset[str]] = frozenset({_MIN_RANK_KEY})
    lost: ClassVar[str] = (
        "it is written as a plain LoRA, whose ranks all act at every noise level: at high noise it acts more than in "
        "training and in the pictures drawn here"
    )

    min_rank: int = 1

    def plain(self) -> Delta:
        return LoRADelta(down=self.down, up=self.up, alpha=self.alpha)

    @classmethod
    def reads(cls, parts: Set[str], metadata: Mapping[str, str]) -> bool:
        return _MIN_RANK_KEY in metadata and LoRADelta.reads(parts, metadata)

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        plain, told = LoRADelta.read(parts), parts.metadata[_MIN_RANK_KEY]
        if not told.isascii() or not told.isdecimal() or int(told) < 1:
            raise ValueError(f"{_MIN_RANK_KEY} is {told[:40]!r} and should be a whole number from 1 on")
        return cls(down=plain.down, up=plain.up, alpha=plain.alpha, min_rank=int(told))

    def notes(self) -> dict[str, str]:
        return {_MIN_RANK_KEY: str(self.min_rank)}

    def held_by(self, form: Form) -> Self:
        if form == "diffusers":
            raise ParameterError("diffusers has no form for tlora: `sd3pipe export` makes a plain LoRA of it")
        return self

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        return TLoRA(setup, spec.tlora_min_rank)

    def layer(self, setup: LayerSetup) -> AdapterLayer:
        return TLoRA(setup, self.min_rank)
