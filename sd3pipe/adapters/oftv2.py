"""OFTv2 (arXiv:2506.19847): a layer's inputs are turned block by block, with the names and the series of peft."""

# I in features, O out features, K blocks, N width of a block, E entries above a block's diagonal

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.full import in_full
from sd3pipe.adapters.fusing import Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdaptedLinear, AdapterLayer, Delta, LayerSetup, on_cpu
from sd3pipe.adapters.oft import Rotation, cayley, moved
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.peft_config import CAYLEY_KEY, EXACT_CAYLEY
from sd3pipe.adapters.targets import QKV_PARTS, AdapterSpec
from sd3pipe.adapters.weights import block_width


class OFTv2(AdapterLayer):
    """y = W (x R) + b with R near an orthogonal matrix of blocks."""

    through_weight = True

    _places: Tensor

    def __init__(self, setup: LayerSetup, *, exact: bool = False) -> None:
        super().__init__(setup)
        self.exact = exact
        self.upper = setup.parameter(setup.in_features // setup.rank, setup.rank * (setup.rank - 1) // 2)
        self.register_buffer("_places", places_above(setup.rank).to(self.upper.device), persistent=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.upper.zero_()

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        return linear.base(x + self.acting(self.term(x)))

    def term(self, x: Tensor) -> Tensor:
        """Returns what the turn adds to the input."""
        with torch.autocast(x.device.type, enabled=False):
            turn_KNN = turn(self.upper.float(), self._places, exact=self.exact)
        return moved(x, turn_KNN)

    def delta(self) -> "OFTv2Delta":
        return OFTv2Delta(upper=on_cpu(self.upper), exact=self.exact)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OFTv2Delta(Rotation):
    """W R^T, in blocks of columns, of the entries above the diagonals of skew Q [K, E], row by row.

    R is 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, peft's five terms of Neumann's series, with which OneTrainer trains, too.
    Where `exact` is set, as by peft's use_cayley_neumann=False, it is (1 - Q)(1 + Q)^-1, which turns the other way.
    """

    algorithm: ClassVar[str] = "oftv2"
    title: ClassVar[str] = "rotation of inputs (OFTv2)"
    network_args: ClassVar[Mapping[str, str]] = {"algo": "oftv2"}
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "oft_R.weight": (".oft_R.weight", ".oft_R.default.weight"),
        "oft_R.scaled_oft": (".oft_R.scaled_oft",),
    }
    layer_class: ClassVar[type[AdapterLayer]] = OFTv2
    note_keys: ClassVar[frozenset[str]] = frozenset({CAYLEY_KEY})
    in_pipelines: ClassVar[bool] = False

    alpha: float = 1.0  # does not count
    upper: Tensor
    exact: bool = False

    def __post_init__(self) -> None:
        entries = self.upper.shape[-1]
        if self.upper.ndim != 2 or not self.upper.numel() or self.rank * (self.rank - 1) // 2 != entries:
            raise ValueError(f"{list(self.upper.shape)} are no entries above the diagonals of square blocks")

    @property
    def rank(self) -> int:
        """The width of a block."""
        return (1 + math.isqrt(1 + 8 * self.upper.shape[-1])) // 2

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return 0, self.upper.shape[0] * self.rank

    def turn(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return turn(self.upper.to(dtype), places_above(self.rank).to(self.upper.device), exact=self.exact)

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        return moved(weight_OI.float(), self.turn().mT.to(weight_OI.device))

    def with_rows(self, rows: Rows) -> Self:
        return self  # all rows read the same input

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self | None:
        """Returns the one turn of what q, k and v read in common, None where they read it turned otherwise."""
        first = next(iter(parts.values()))
        alike = len(parts) == QKV_PARTS and all(first.same_as(part) for part in parts.values())
        return first if alike else None

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        (upper,) = parts.matrices("oft_R.weight")
        if len(upper) == 1:
            raise ValueError("one rotation for all blocks of a layer (block_share) is not read")
        delta = cls(upper=upper, exact=parts.metadata.get(CAYLEY_KEY) == EXACT_CAYLEY)
        if "oft_R.scaled_oft" in parts.tensors:  # OneTrainer's mark of another unit
            return replace(delta, upper=upper.float() / (2.0 * math.sqrt(delta.rank - 1)))
        return delta

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        return {"oft_R.weight": self.upper}

    def notes(self) -> dict[str, str]:
        return {CAYLEY_KEY: EXACT_CAYLEY} if self.exact else {}

    def held_by(self, form: Form) -> Self:
        return self

    def suits(self, form: Form) -> bool:
        return form in ("native", "diffusers")

    def suited(self, form: Form, weight_OI: Tensor) -> Delta:
        """Returns the change written out, which is all that ComfyUI reads of it."""
        return self if self.suits(form) else in_full(self, weight_OI)

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        return OFTv2(replace(setup, rank=block_width(setup.in_features, setup.rank)))

    def layer(self, setup: LayerSetup) -> AdapterLayer:
        return OFTv2(setup, exact=self.exact)


def places_above(width: int) -> Tensor:
    """Returns where the entries above the diagonal of a block lie in it, row by row."""
    rows, columns = torch.triu_indices(width, width, 1)
    return rows * width + columns


def turn(upper_KE: Tensor, places_E: Tensor, *, exact: bool) -> Tensor:
    """Returns R - 1 [K, N, N]."""
    width = (1 + math.isqrt(1 + 8 * upper_KE.shape[1])) // 2
    flat = upper_KE.new_zeros(len(upper_KE), width * width).index_copy(1, places_E, upper_KE)
    above_KNN = flat.unflatten(1, (width, width))
    skew_KNN = above_KNN - above_KNN.mT
    if exact:
        return cayley(-skew_KNN)
    twice_NN = 2.0 * torch.eye(width, dtype=upper_KE.dtype, device=upper_KE.device)
    series_KNN = twice_NN + skew_KNN
    for _ in range(2):
        series_KNN = twice_NN + skew_KNN @ series_KNN
    return skew_KNN @ series_KNN
