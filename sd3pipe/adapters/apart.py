"""q, k and v of a fused layer, adapted apart: as one delta where there is such, else side by side."""

# I in features, O out features

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.full import Full, in_full
from sd3pipe.adapters.fusing import Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdapterLayer, Delta
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS
from sd3pipe.errors import InputError, ParameterError


def join_qkv(parts: Mapping[int, Delta]) -> Delta:
    """Returns the one change of a fused layer whose q (0), k (1) and v (2) rows change as given, or do not if missing.

    It is of the parts' kind where that can hold it, else a LoRA where all are products of so few ranks that it is
    smaller than the layer's own matrix, else they stay apart.
    """
    kinds = {type(delta) for delta in parts.values()}
    joined = kinds.pop().join(parts) if len(kinds) == 1 else None
    if joined is not None:
        return joined
    products = {index: delta.product() for index, delta in parts.items()}
    loras = {index: LoRADelta.of(product) for index, product in products.items() if product is not None}
    apart = Apart(parts=parts)
    rows, columns = apart.shape
    ranks = sum(delta.rank for delta in loras.values())
    is_smaller = ranks * (rows + columns) < rows * columns  # a Kronecker product of few weights may have all ranks
    return LoRADelta.join(loras) if len(loras) == len(parts) and is_smaller else apart


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Apart(Delta):
    """The rows of q, k and v change each by a delta of its own, or not where it is missing; no file of fused layers."""

    algorithm: ClassVar[str] = "apart"
    title: ClassVar[str] = "change of q, k and v apart"
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    layer_class: ClassVar[type[AdapterLayer]] = Full

    alpha: float = 1.0  # does not count
    parts: Mapping[int, Delta]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = next(iter(self.parts.values())).shape
        return QKV_PARTS * rows, columns

    @property
    def needs_base(self) -> bool:
        return any(part.needs_base for part in self.parts.values())

    @property
    def trainable(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, part in self.parts.items() for name, tensor in part.tensors().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        own = {i: {name: tensors[f"{i}.{name}"] for name in part.tensors()} for i, part in self.parts.items()}
        return replace(self, parts={i: part.with_tensors(own[i]) for i, part in self.parts.items()})

    def cast(self, dtype: torch.dtype) -> Self:
        return self._each(lambda part: part.cast(dtype))

    def balanced(self) -> Self:
        return self._each(lambda part: part.balanced())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._whole({index: part.dense(dtype) for index, part in self.parts.items()})

    def norm(self) -> float:
        return math.hypot(*(part.norm() for part in self.parts.values()))

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        if rows is None:
            thirds = weight_OI.chunk(QKV_PARTS)
            return self._whole({index: part.change(thirds[index]) for index, part in self.parts.items()})
        (index,) = rows(torch.arange(QKV_PARTS)).tolist()  # rows of a fused layer are q, k or v
        return self.parts[index].change(weight_OI) if index in self.parts else torch.zeros_like(weight_OI)

    def bias_change(self) -> Tensor | None:
        changes = {index: part.bias_change() for index, part in self.parts.items()}
        found = {index: change for index, change in changes.items() if change is not None}
        return self._whole(found) if found else None

    def same_as(self, other: Delta) -> bool:
        """Compares each part with its own strength."""
        if not isinstance(other, Apart) or other.parts.keys() != self.parts.keys():
            return False
        return all(part.same_as(other.parts[index]) for index, part in self.parts.items())

    def _difference(self, other: Delta) -> float:
        if not isinstance(other, Apart) or other.parts.keys() != self.parts.keys():
            return Delta._difference(self, other)
        return max(part.difference(other.parts[index]) for index, part in self.parts.items())

    def scaled(self, weight: float) -> Self:
        return self._each(lambda part: part.scaled(weight))

    def with_rows(self, rows: Rows) -> Delta:
        raise InputError("q, k and v are adapted apart, and only whole ones of them can be taken")

    def split(self) -> Mapping[int, Delta]:
        return self.parts

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        raise ValueError("q, k and v have no tensors together")

    def held_by(self, form: Form) -> Self:
        if form == "diffusers":
            return self._each(lambda part: part.held_by(form))
        kinds = " and ".join(sorted({part.title for part in self.parts.values()}))
        resize = "" if self.needs_base else "turn it into a LoRA with `sd3pipe adapter resize --rank N`, or "
        raise ParameterError(
            f"{form} has q, k and v in one layer, and no form for a {kinds} of each: {resize}merge it into a model "
            "with `sd3pipe export --format checkpoint`"
        )

    def notes(self) -> dict[str, str]:
        return {key: note for part in self.parts.values() for key, note in part.notes().items()}

    def suits(self, form: Form) -> bool:
        return form != "native" and all(part.suits(form) for part in self.parts.values())

    def suited(self, form: Form, weight_OI: Tensor) -> Delta:
        if form == "native":
            return in_full(self, weight_OI)
        thirds = weight_OI.chunk(QKV_PARTS)
        return replace(self, parts={i: part.suited(form, thirds[i]) for i, part in self.parts.items()})

    def _each(self, change: Callable[[Delta], Delta]) -> Self:
        return replace(self, parts={index: change(part) for index, part in self.parts.items()})

    def _whole(self, rows: Mapping[int, Tensor]) -> Tensor:
        none = torch.zeros_like(next(iter(rows.values())))
        return torch.cat([rows.get(index, none) for index in range(QKV_PARTS)])
