"""The trained term of one linear layer: the base class, and LoRA (arXiv:2106.09685) with one or three outputs."""

# B batch, I in features, O out features, R rank, P parts of a fused layer; a name without axes has any between B and I

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.adapters.deltas import Algorithm, Delta, LoRADelta
from sd3pipe.adapters.dropout import DropoutKeys, DropoutRates, as_int64, kept
from sd3pipe.errors import InputError

QKV_PARTS = 3
_KINDS_OF_DROPOUT = 3


class AdaptedLinear(Protocol):
    """What an adapter layer asks of the linear layer that it is attached to."""

    @property
    def bias(self) -> Tensor: ...

    def base(self, x: Tensor) -> Tensor:
        """Returns x W^T + b for the base weight alone."""
        ...

    def dense_weight(self) -> Tensor:
        """Returns the base weight [O, I], unpacked if need be."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSetup:
    """What every kind of layer is built from. `stream` is the layer's number, `keys` is shared by the whole network."""

    in_features: int
    out_features: int
    rank: int
    alpha: float
    dropout: DropoutRates
    keys: DropoutKeys
    stream: int
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameter(self, *shape: int) -> nn.Parameter:
        """Returns an uninitialised trained tensor."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


class AdapterLayer(nn.Module, ABC):
    """base(x) + multiplier * term(x). Training drops parts of the term; evaluation never does."""

    algorithm: Algorithm
    _dropout_streams: Tensor  # one for each kind of dropout

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__()
        self.setup = setup
        self.multiplier = 1.0
        numbers = [as_int64(setup.stream * _KINDS_OF_DROPOUT + kind) for kind in range(_KINDS_OF_DROPOUT)]
        self.register_buffer("_dropout_streams", torch.tensor(numbers, device=setup.device), persistent=False)

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        return linear.base(x) + self.scaled(self.drop_module(self.term(x)))

    @abstractmethod
    def term(self, x: Tensor) -> Tensor:
        """Returns what the layer adds to the output [B, ..., O] for x [B, ..., I]."""

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draws the start values on the CPU, so that they are the same on every device; the term is then zero."""

    @abstractmethod
    def delta(self) -> Delta:
        """Returns the change of the weight as its factors: detached copies on the CPU."""

    @abstractmethod
    def take(self, delta: Delta) -> None:
        """Copies factors that were checked to be of this layer's kind, shape and scale."""

    def load(self, delta: Delta) -> None:
        """Takes over trained factors. Raises InputError where kind, shape, rank or scale differ."""
        ours = self.delta()
        if (ours.algorithm, ours.shape, ours.rank) != (delta.algorithm, delta.shape, delta.rank):
            raise InputError(f"the file has {_described(delta)}, the network {_described(ours)}")
        if not math.isclose(ours.scale, delta.scale, rel_tol=1e-5):
            raise InputError(f"the file acts at alpha / rank {delta.scale:g}, the network at {ours.scale:g}")
        self.take(delta)

    def scaled(self, term: Tensor) -> Tensor:
        return term if self.multiplier == 1.0 else term * self.multiplier

    def drop_module(self, term: Tensor) -> Tensor:
        """Drops the whole term of some samples; the others are not scaled up, as in sd-scripts."""
        rate = self.setup.dropout.module
        if not (self.training and rate):
            return term
        return term * self._kept((term.shape[0],) + (1,) * (term.ndim - 1), rate, kind=0)

    def drop_ranks(self, low: Tensor) -> Tensor:
        """Drops rank activations [B, ..., R], and whole ranks of some samples; what stays is scaled up."""
        dropout = self.setup.dropout
        if self.training and dropout.neuron:
            low = low * self._kept(tuple(low.shape), dropout.neuron, kind=1) / (1.0 - dropout.neuron)
        if self.training and dropout.rank:
            shape = (low.shape[0], *(1,) * (low.ndim - 2), low.shape[-1])
            low = low * self._kept(shape, dropout.rank, kind=2) / (1.0 - dropout.rank)
        return low

    def _kept(self, shape: tuple[int, ...], rate: float, *, kind: int) -> Tensor:
        keys_B = self.setup.keys.keys
        assert keys_B is not None, "dropout needs AdapterNetwork.set_dropout_keys before each training batch"
        return kept(keys_B, self._dropout_streams[kind], shape, rate)


class LoRA(AdapterLayer):
    """scale * up(down(x)): down starts as torch's linear layers do, up at zero."""

    algorithm = "lora"

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.down = setup.parameter(setup.rank, setup.in_features)
        self.up = setup.parameter(setup.out_features, setup.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.down.copy_(kaiming_uniform(tuple(self.down.shape), generator))
        self.up.zero_()

    def term(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.down.to(x.dtype))
        return self.raised(self.drop_ranks(low) * self.setup.scale)

    def raised(self, low: Tensor) -> Tensor:
        """Returns up(low) [..., O] for rank activations [..., R]."""
        return functional.linear(low, self.up.to(low.dtype))

    def delta(self) -> LoRADelta:
        return LoRADelta(down=on_cpu(self.down), up=on_cpu(self.up), alpha=self.setup.alpha)

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        assert isinstance(delta, LoRADelta)
        self.down.copy_(delta.down)
        self.up.copy_(delta.up)

    @torch.no_grad()
    def limit_norm(self, largest: float) -> tuple[Tensor, Tensor]:
        """Shrinks both factors alike where |scale up down| exceeds `largest`.

        Returns the norm that remains and whether the factors shrank, both without a host sync.
        """
        down, up = self.down.float(), self.up.float()
        return self._shrink(((up.T @ up) * (down @ down.T)).sum(), largest)

    def _shrink(self, squared_norm: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        norm = squared_norm.clamp_min(0.0).sqrt() * abs(self.setup.scale)
        ratio = (largest / norm.clamp_min(largest)).sqrt()
        self.down.mul_(ratio)
        self.up.mul_(ratio)
        return norm.clamp_max(largest), norm > largest


class SplitLoRA(LoRA):
    """LoRA on a fused q, k, v layer with a rank of its own for each of the three: up is block-diagonal.

    As one LoRA it has rank 3 R, so its alpha is 3 alpha: sd-scripts' `split_qkv` leaves it, and acts at a third.
    """

    def __init__(self, setup: LayerSetup) -> None:
        AdapterLayer.__init__(self, setup)
        self.down = setup.parameter(QKV_PARTS * setup.rank, setup.in_features)
        self.up = setup.parameter(QKV_PARTS, setup.out_features // QKV_PARTS, setup.rank)

    def raised(self, low: Tensor) -> Tensor:
        parts = zip(low.chunk(QKV_PARTS, dim=-1), self.up.to(low.dtype), strict=True)
        return torch.cat([functional.linear(low_part, up_OR) for low_part, up_OR in parts], dim=-1)

    def delta(self) -> LoRADelta:
        up_OR = torch.block_diag(*on_cpu(self.up))
        return LoRADelta(down=on_cpu(self.down), up=up_OR, alpha=QKV_PARTS * self.setup.alpha)

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        assert isinstance(delta, LoRADelta)
        blocks = diagonal_blocks(delta.up, QKV_PARTS)
        if blocks is None:
            raise InputError("the file was not trained with split_qkv: its q, k and v share ranks")
        self.down.copy_(delta.down)
        self.up.copy_(torch.stack(blocks))

    @torch.no_grad()
    def limit_norm(self, largest: float) -> tuple[Tensor, Tensor]:
        down_PRI = self.down.float().unflatten(0, (QKV_PARTS, -1))
        up_POR = self.up.float()
        return self._shrink(((up_POR.mT @ up_POR) * (down_PRI @ down_PRI.mT)).sum(), largest)


def diagonal_blocks(up_OR: Tensor, parts: int) -> list[Tensor] | None:
    """Returns the equal diagonal blocks of a matrix whose other entries are all zero, else None."""
    rows, ranks = up_OR.shape
    if rows % parts or ranks % parts:
        return None
    blocks = [
        row[:, i * (ranks // parts) : (i + 1) * (ranks // parts)] for i, row in enumerate(up_OR.chunk(parts, dim=0))
    ]
    return blocks if torch.equal(torch.block_diag(*blocks), up_OR) else None


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns an fp32 matrix uniform in +-1/sqrt(columns): kaiming_uniform_ with a = sqrt(5)."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def on_cpu(tensor: Tensor) -> Tensor:
    """Returns a detached copy on the CPU in fp32, which holds every trained dtype exactly."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _described(delta: Delta) -> str:
    return f"{delta.algorithm} of rank {delta.rank} on {list(delta.shape)}"
