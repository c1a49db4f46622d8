"""DoRA (arXiv:2402.09353): LoRA changes the direction of each row of the weight, a trained magnitude its norm."""

# I in features, O out features, R rank, C input channels of the layer

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.apart import Apart, join_qkv
from sd3pipe.adapters.full import in_full
from sd3pipe.adapters.fusing import Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdaptedLinear, AdapterLayer, Delta, LayerSetup, on_cpu, relative_difference
from sd3pipe.adapters.loha import LoHaDelta
from sd3pipe.adapters.lokr import LoKrDelta
from sd3pipe.adapters.lora import LoRA, LoRADelta
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS
from sd3pipe.errors import InputError, ParameterError

_NORM_KEY = "sd3pipe_dora_norm"  # in a file's metadata: "base" where the magnitudes are over the base's rows


class DoRA(LoRA):
    """W' = m (W + s up down) / |W + s up down|, rows apart; the norm passes no gradient, as in its section 4.3.

    The output is written as base(x) plus terms that are exactly zero at the start, where m equals the norms of W.
    """

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.magnitude = setup.parameter(setup.out_features)

    @torch.no_grad()
    def measure(self, linear: AdaptedLinear) -> None:
        """Sets the magnitude to the norms of the rows at hand, so that the layer changes nothing."""
        self.magnitude.copy_(self._norms(linear))

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        y = linear.base(x)
        gain_O = self.magnitude.float() / self._norms(linear)
        product = y - linear.bias.to(y.dtype)
        change = (gain_O - 1.0).to(y.dtype) * product + gain_O.to(y.dtype) * self.term(x)
        return y + self.acting(change)

    @torch.no_grad()
    def _norms(self, linear: AdaptedLinear) -> Tensor:
        with torch.autocast(self.down.device.type, enabled=False):
            weight_OI = linear.dense_weight().to(self.down.device)
            return merged_row_norms(weight_OI, self.down, self.up, self.setup.scale)

    def delta(self) -> "DoRADelta":
        return DoRADelta(direction=LoRA.delta(self), magnitude=on_cpu(self.magnitude))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DoRADelta(Delta):
    """W and another kind's change, in rows or columns of trained norms; `dense` is that change of direction alone.

    The magnitude is [O] of rows, or [1, C] of columns, where the patch embedder's columns of one input channel count as
    one. It is divided by the norms of the sum, as in the paper and in peft; or, where `base_norm` is set, by those of
    the rows of W, which is what ComfyUI does with a magnitude per output row.
    """

    algorithm: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    network_args: ClassVar[Mapping[str, str]] = {"algo": "lora", "dora_wd": "True"}
    options: ClassVar[frozenset[str]] = LoRADelta.options - {"split_qkv"}
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dora_scale": (".dora_scale",),
        "magnitude": (
            ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight",
        ),
    }  # fmt: skip
    layer_class: ClassVar[type[AdapterLayer]] = DoRA
    note_keys: ClassVar[frozenset[str]] = frozenset({_NORM_KEY})

    alpha: float = 1.0  # that of the direction, whatever is given
    direction: Delta
    magnitude: Tensor
    base_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", self.direction.alpha)
        (rows, columns), size = self.direction.shape, self.magnitude.numel()
        if columns % size if self._of_columns else size != rows:
            raise ValueError(f"magnitudes {list(self.magnitude.shape)} do not match a layer of {[rows, columns]}")

    @property
    def rank(self) -> int:
        return self.direction.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def trainable(self) -> bool:
        return isinstance(self.direction, LoRADelta) and not self._of_columns

    @property
    def _of_columns(self) -> bool:
        return self.magnitude.ndim > 1

    def tensors(self) -> dict[str, Tensor]:
        return self.direction.tensors() | {"magnitude": self.magnitude}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        of_direction = {name: tensors[name] for name in self.direction.tensors()}
        return replace(self, direction=self.direction.with_tensors(of_direction), magnitude=tensors["magnitude"])

    def cast(self, dtype: torch.dtype) -> Self:
        """Leaves magnitudes in fp32: they are few, and their error would act on the whole weight."""
        return replace(self, direction=self.direction.cast(dtype))

    def balanced(self) -> Self:
        return replace(self, direction=self.direction.balanced())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.direction.dense(dtype)

    def norm(self) -> float:
        return self.direction.norm()

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        weight_OI = weight_OI.float()
        merged_OI = weight_OI + self.direction.change(weight_OI, rows)
        if not self._of_columns:
            magnitude_O = self.magnitude if rows is None else rows(self.magnitude)
            gain_O = magnitude_O.float() / _row_norms(weight_OI if self.base_norm else merged_OI)
            return gain_O[:, None] * merged_OI - weight_OI
        if len(merged_OI) < self.shape[0]:
            raise InputError("the norms of a DoRA's columns are those of q, k and v together: merge into a single file")
        grouped_OCI = merged_OI.unflatten(1, (self.magnitude.numel(), -1))
        gain_1C1 = self.magnitude.float()[..., None] / _row_norms(grouped_OCI.transpose(0, 1).flatten(1))[None, :, None]
        return (gain_1C1 * grouped_OCI).flatten(1) - weight_OI

    def _difference(self, other: Delta) -> float:
        assert isinstance(other, DoRADelta)
        apart = relative_difference(self.magnitude.double(), other.magnitude.double())
        return max(self.direction.difference(other.direction), apart)

    def scaled(self, weight: float) -> Self:
        if weight != 1.0:
            raise ParameterError("a DoRA cannot be weighted: its magnitudes act on the whole weight")
        return self

    def with_rows(self, rows: Rows) -> Self:
        direction = self.direction.with_rows(rows)
        if not self._of_columns:
            return replace(self, direction=direction, magnitude=rows(self.magnitude))
        if direction.shape != self.shape:
            raise InputError("the norms of a DoRA's columns are those of all rows, which cannot be taken apart")
        return replace(self, direction=direction)

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self | None:
        base_norms = {part.base_norm for part in parts.values()}
        if len(parts) < QKV_PARTS or len(base_norms) > 1 or any(part._of_columns for part in parts.values()):
            return None
        direction = join_qkv({index: part.direction for index, part in parts.items()})
        if isinstance(direction, Apart):
            return None
        magnitude = torch.cat([parts[index].magnitude for index in range(QKV_PARTS)])
        return cls(direction=direction, magnitude=magnitude, base_norm=base_norms.pop())

    @classmethod
    def reads(cls, parts: Set[str], metadata: Mapping[str, str]) -> bool:
        own = parts & cls.part_names.keys()
        return len(own) == 1 and any(kind.reads(parts - own, metadata) for kind in _DIRECTIONS)

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        rest = parts.tensors.keys() - cls.part_names.keys()
        direction = next(kind for kind in _DIRECTIONS if kind.reads(rest, parts.metadata)).read(parts)
        scale = parts.tensors.get("dora_scale")
        if scale is not None and scale.ndim > 1 and scale.shape[0] == 1 < direction.shape[0]:
            return cls(direction=direction, magnitude=scale.reshape(1, -1))
        magnitude = parts.tensors["magnitude"] if scale is None else scale
        base_norm = parts.metadata.get(_NORM_KEY) == "base"
        return cls(direction=direction, magnitude=magnitude.flatten(), base_norm=base_norm)

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        ones = (1, 1) if patches else ()
        if form == "diffusers":  # with peft's axes
            name, axes = "lora_magnitude_vector.weight", (1, -1, 1, 1) if patches else (-1,)
        else:  # one axis for each of the weight's, for broadcasting
            name, axes = "dora_scale", (1, -1, *ones) if self._of_columns else (-1, 1, *ones)
        return self.direction.file_tensors(form, patches=patches) | {name: self.magnitude.view(axes)}

    def notes(self) -> dict[str, str]:
        return {_NORM_KEY: "base"} if self.base_norm else {}

    def held_by(self, form: Form) -> Self:
        if form == "diffusers" and self.base_norm:
            raise ParameterError("this DoRA was exported for ComfyUI: --model is needed to turn its magnitudes back")
        if form == "diffusers" and self._of_columns:
            raise ParameterError(
                "diffusers has no form for a DoRA with magnitudes per input column: export it as comfyui"
            )
        return replace(self, direction=self.direction.held_by(form))

    def suits(self, form: Form) -> bool:
        if form == "native":
            return self.trainable and not self.base_norm
        return self._of_columns or self.base_norm == (form in ("comfyui", "comfyui-generic"))

    def suited(self, form: Form, weight_OI: Tensor) -> Delta:
        if self.suits(form):
            return self
        if form == "native" and not self.trainable:
            return in_full(self, weight_OI)
        base_O = _row_norms(weight_OI.float())
        ratio_O = _row_norms(weight_OI.float() + self.direction.change(weight_OI.float())) / base_O
        magnitude = self.magnitude.float() * (ratio_O if self.base_norm else 1.0 / ratio_O)
        return replace(self, base_norm=not self.base_norm, magnitude=magnitude)


_DIRECTIONS: tuple[type[Delta], ...] = (LoRADelta, LoHaDelta, LoKrDelta)


def _row_norms(matrix_OI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix_OI, dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def merged_row_norms(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """Returns sqrt(|w|^2 + 2 s <w, b A> + s^2 |b A|^2) for each row w of W and b of up, in fp32."""
    weight_OI, down_RI, up_OR = weight_OI.float(), down_RI.float(), up_OR.float()
    crossed_O = ((weight_OI @ down_RI.T) * up_OR).sum(1)
    squared_O = ((up_OR @ (down_RI @ down_RI.T)) * up_OR).sum(1)
    total_O = weight_OI.square().sum(1) + 2.0 * scale * crossed_O + scale * scale * squared_O
    return total_O.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
