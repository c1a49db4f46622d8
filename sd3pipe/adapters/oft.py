"""OFT (arXiv:2306.07280): a layer's outputs are turned block by block, with LyCORIS' names and ComfyUI's formula."""

# I in features, O out features, K blocks, N width of a block; a name without axes has any between B and the last

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.fusing import Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdaptedLinear, AdapterLayer, Delta, LayerSetup, on_cpu, relative_difference
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS, AdapterSpec
from sd3pipe.adapters.weights import turned_width
from sd3pipe.errors import InputError, ParameterError

_TINY = 1e-8  # keeps ComfyUI's division by a norm from zero
_BLOCK_AXES = 3  # BOFT has several sets of blocks


class OFT(AdapterLayer):
    """y = R (W x) + b of an orthogonal R of blocks. A constraint above 0, which is `alpha`, bounds how far it turns."""

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.blocks = setup.parameter(setup.out_features // setup.rank, setup.rank, setup.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.blocks.zero_()

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        y = linear.base(x)
        return y + self.acting(self.term(y - linear.bias.to(y.dtype)))

    def term(self, x: Tensor) -> Tensor:
        """Returns what the turn adds to the base's product, which is x here."""
        with torch.autocast(x.device.type, enabled=False):
            turn_KNN = cayley(constrained(skew(self.blocks.float()), self.setup.alpha))
        return moved(x, turn_KNN)

    def delta(self) -> "OFTDelta":
        return OFTDelta(blocks=on_cpu(self.blocks), alpha=self.setup.alpha)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation(Delta, ABC):
    """A weight turned by blocks. `turn` is all that is known without the weight; only one side's width shows."""

    @abstractmethod
    def turn(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the blocks R - 1 [K, N, N]."""

    @property
    def needs_base(self) -> bool:
        return True

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns R - 1 as a whole."""
        return torch.block_diag(*self.turn(dtype))

    def norm(self) -> float:
        """Returns the Frobenius norm of R - 1."""
        return float(torch.linalg.vector_norm(self.turn(torch.float64)))

    def _difference(self, other: Delta) -> float:
        assert isinstance(other, Rotation)
        return relative_difference(self.turn(torch.float64), other.turn(torch.float64))

    def scaled(self, weight: float) -> Self:
        if weight != 1.0:
            raise ParameterError(f"a {self.title} cannot be weighted: half a turn is no rotation")
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OFTDelta(Rotation):
    """R W, in blocks of rows: R^T = (1 + Q)(1 - Q)^-1 with Q = B - B^T of the blocks B [K, N, N].

    Above 0, alpha is the largest Frobenius norm that all Q of a layer together may have: what is longer is shortened.
    LyCORIS and sd-scripts train with alpha times the layer's rows, and save alpha; this is how ComfyUI reads it.
    """

    algorithm: ClassVar[str] = "oft"
    title: ClassVar[str] = "rotation of outputs (OFT)"
    network_args: ClassVar[Mapping[str, str]] = {"algo": "diag-oft"}
    options: ClassVar[frozenset[str]] = frozenset({"network_alpha"})
    default_alpha: ClassVar[float | None] = 0.0
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {"oft_blocks": (".oft_blocks",)}
    file_prefix: ClassVar[str] = "oft_"
    layer_class: ClassVar[type[AdapterLayer]] = OFT

    blocks: Tensor

    def __post_init__(self) -> None:
        if self.blocks.ndim != _BLOCK_AXES or self.blocks.shape[1] != self.blocks.shape[2] or not self.blocks.numel():
            what = "it is a BOFT, which is not read: " if self.blocks.ndim > _BLOCK_AXES else ""
            raise ValueError(f"{what}the blocks {list(self.blocks.shape)} are no set of square ones")

    @property
    def rank(self) -> int:
        """The width of a block."""
        return self.blocks.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0] * self.rank, 0

    def turn(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return cayley(constrained(skew(self.blocks.to(dtype)), self.alpha))

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        delta = self if rows is None else self.with_rows(rows)
        return moved(weight_OI.float().T, delta.turn().to(weight_OI.device)).T

    def with_rows(self, rows: Rows) -> Self:
        """Returns some rows' blocks, without constraint, which is one for all. Raises InputError where rows cut one."""
        numbers = rows(torch.arange(self.shape[0]))
        blocks_K = numbers[:: self.rank] // self.rank
        if not torch.equal(numbers, (blocks_K[:, None] * self.rank + torch.arange(self.rank)).flatten()):
            raise InputError(f"blocks of {self.rank} rows cannot be taken apart into q, k and v, or halves")
        return replace(self, blocks=self._unconstrained()[blocks_K.to(self.blocks.device)], alpha=0.0)

    def _unconstrained(self) -> Tensor:
        skew_KNN = skew(self.blocks.float())
        free = self.alpha <= 0.0 or torch.equal(constrained(skew_KNN, self.alpha), skew_KNN)
        return self.blocks if free else constrained(skew_KNN, self.alpha).triu()  # whose skew part it is again

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self | None:
        first = next(iter(parts.values()))
        if len({part.blocks.shape for part in parts.values()}) > 1:
            return None
        none = torch.zeros_like(first.blocks)
        whole = [parts[index]._unconstrained() if index in parts else none for index in range(QKV_PARTS)]
        return cls(blocks=torch.cat(whole), alpha=0.0)

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        return cls(blocks=parts.tensors["oft_blocks"], alpha=parts.own_alpha() or 0.0)

    def held_by(self, form: Form) -> Self:
        if form == "diffusers":
            raise ParameterError(
                "diffusers has no form for oft, since peft turns inputs: export it as comfyui, or merge it into a "
                "model with --format checkpoint"
            )
        return self

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        return OFT(replace(setup, rank=turned_width(path, setup.out_features, setup.rank)))


def skew(blocks_KNN: Tensor) -> Tensor:
    return blocks_KNN - blocks_KNN.mT


def constrained(skew_KNN: Tensor, largest: float) -> Tensor:
    """Returns blocks whose common Frobenius norm is at most `largest`, where that is above 0."""
    if largest <= 0.0:
        return skew_KNN
    norm = torch.linalg.vector_norm(skew_KNN) + _TINY
    return torch.where(norm > largest, skew_KNN * (largest / norm), skew_KNN)


def cayley(skew_KNN: Tensor) -> Tensor:
    """Returns (1 + Q)(1 - Q)^-1 - 1 = 2 Q (1 - Q)^-1, which is exactly zero at the start."""
    identity_NN = torch.eye(skew_KNN.shape[-1], dtype=skew_KNN.dtype, device=skew_KNN.device)
    solved = torch.linalg.solve_ex(identity_NN - skew_KNN, 2.0 * skew_KNN)  # always can be, so that none need check it
    return solved.result


def moved(x: Tensor, turn_KNN: Tensor) -> Tensor:
    """Returns what a turn adds to x [..., K N]: x (R - 1)."""
    parts = x.unflatten(-1, (turn_KNN.shape[0], -1))
    return torch.einsum("...kn,knm->...km", parts, turn_KNN.to(x.dtype)).flatten(-2)
