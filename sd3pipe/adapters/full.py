"""A change written out, with that of the bias: LyCORIS' `full`, and what any change becomes in a dense layer."""

# I in features, O out features

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from sd3pipe.adapters.fusing import PATCH_AXES, Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdapterLayer, Delta, LayerSetup, on_cpu, relative_difference
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS


class Full(AdapterLayer):
    """diff x + bias."""

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.diff = setup.parameter(setup.out_features, setup.in_features)
        self.bias = setup.parameter(setup.out_features)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.diff.zero_()
        self.bias.zero_()

    def term(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.diff.to(x.dtype), self.bias.to(x.dtype))

    def delta(self) -> "FullDelta":
        return FullDelta(diff=on_cpu(self.diff), bias=on_cpu(self.bias))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullDelta(Delta):
    """W + diff [O, I], b + bias [O]."""

    algorithm: ClassVar[str] = "full"
    title: ClassVar[str] = "full change"
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {"diff": (".diff",), "diff_b": (".diff_b",)}
    layer_class: ClassVar[type[AdapterLayer]] = Full

    alpha: float = 1.0  # does not count
    diff: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.diff.ndim != 2 or self.bias.shape != self.diff.shape[:1]:
            raise ValueError(f"diff {list(self.diff.shape)} and diff_b {list(self.bias.shape)} do not match")

    @classmethod
    def of(cls, diff_OI: Tensor, bias_O: Tensor | None = None) -> Self:
        """Returns a change of the weight, and of the bias where there is one."""
        return cls(diff=diff_OI, bias=diff_OI.new_zeros(len(diff_OI)) if bias_O is None else bias_O)

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], self.diff.shape[1]

    @property
    def trainable(self) -> bool:
        return False

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.diff.to(dtype)

    def bias_change(self) -> Tensor | None:
        return self.bias if bool(self.bias.any()) else None

    def _difference(self, other: Delta) -> float:
        """Compares the biases, too, where they change."""
        theirs = other.bias_change()
        theirs = torch.zeros_like(self.bias) if theirs is None else theirs
        of_bias = relative_difference(self.bias.double(), theirs.double())
        return max(Delta._difference(self, other), of_bias)

    def scaled(self, weight: float) -> Self:
        return replace(self, diff=self.diff * weight, bias=self.bias * weight)

    def with_rows(self, rows: Rows) -> Self:
        return replace(self, diff=rows(self.diff), bias=rows(self.bias))

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self:
        none = next(iter(parts.values())).scaled(0.0)
        whole = [parts.get(index, none) for index in range(QKV_PARTS)]
        return cls(diff=torch.cat([part.diff for part in whole]), bias=torch.cat([part.bias for part in whole]))

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        (diff,) = parts.matrices("diff")
        return cls.of(diff, parts.tensors.get("diff_b"))

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        held = {"diff": self.diff.unflatten(1, PATCH_AXES) if patches else self.diff}
        return held if self.bias_change() is None else held | {"diff_b": self.bias}


def in_full(delta: Delta, weight_OI: Tensor) -> FullDelta:
    """Returns the change of one base weight, and of its bias, written out."""
    return FullDelta.of(delta.change(weight_OI.float()), delta.bias_change())
