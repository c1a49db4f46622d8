"""DoRA (arXiv:2402.09353): LoRA changes the direction of each row of the weight, a trained magnitude its norm."""

# I in features, O out features, R rank

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sd3pipe.adapters.fusing import QKV_PARTS, Rows
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kind import AdaptedLinear, AdapterLayer, Delta, LayerSetup, on_cpu, ratio
from sd3pipe.adapters.lora import LoRA, LoRADelta, joined_factors
from sd3pipe.adapters.parts import LayerParts
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
        return y + self.scaled(self.drop_module(change))

    @torch.no_grad()
    def _norms(self, linear: AdaptedLinear) -> Tensor:
        with torch.autocast(self.down.device.type, enabled=False):
            weight_OI = linear.dense_weight().to(self.down.device)
            return merged_row_norms(weight_OI, self.down, self.up, self.setup.scale)

    def delta(self) -> "DoRADelta":
        return DoRADelta(
            down=on_cpu(self.down), up=on_cpu(self.up), alpha=self.setup.alpha, magnitude=on_cpu(self.magnitude)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DoRADelta(LoRADelta):
    """The rows of W + (alpha / R) up down, scaled by a magnitude [O]; `dense` is the change of direction alone.

    They are scaled by magnitude / |row of the sum|, as in the paper and in peft; or, where `base_norm` is set, by
    magnitude / |row of W|, which is what ComfyUI does with a magnitude per output row.
    """

    algorithm: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    options: ClassVar[frozenset[str]] = LoRADelta.options - {"split_qkv"}
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LoRADelta.part_names,
        "dora_scale": (".dora_scale",),
        "magnitude": (
            ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight",
        ),
    }  # fmt: skip
    layer_class: ClassVar[type[AdapterLayer]] = DoRA
    needs_base: ClassVar[bool] = True
    note_keys: ClassVar[frozenset[str]] = frozenset({_NORM_KEY})

    magnitude: Tensor
    base_norm: bool = False

    def __post_init__(self) -> None:
        LoRADelta.__post_init__(self)
        if self.magnitude.shape != self.up.shape[:1]:
            raise ValueError(f"magnitude {list(self.magnitude.shape)} does not match up {list(self.up.shape)}")

    def cast(self, dtype: torch.dtype) -> Self:
        """Leaves magnitudes in fp32: they are few, and their error would act on the whole weight."""
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        delta = self if rows is None else self.with_rows(rows)
        gain_O = delta.magnitude.float() / delta._norms(weight_OI)
        return gain_O[:, None] * (weight_OI + delta.dense()) - weight_OI

    def _norms(self, weight_OI: Tensor) -> Tensor:
        """Returns the norms that the magnitude is divided by."""
        return merged_row_norms(weight_OI, self.down, self.up, 0.0 if self.base_norm else self.scale)

    def _difference(self, other: Delta) -> float:
        ours, theirs = self.magnitude.double(), other.tensors()["magnitude"].double()
        apart = ratio(float(torch.linalg.vector_norm(ours - theirs)), float(torch.linalg.vector_norm(ours)))
        return max(LoRADelta._difference(self, other), apart)

    def scaled(self, weight: float) -> Self:
        if weight != 1.0:
            raise ParameterError("a DoRA cannot be weighted: its magnitudes act on the whole weight")
        return self

    def with_rows(self, rows: Rows) -> Self:
        return replace(self, up=rows(self.up), magnitude=rows(self.magnitude))

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> Self:
        if len(parts) < QKV_PARTS:
            raise InputError("a DoRA that adapts only some of q, k and v has no form in the fused layer")
        down, up, alpha = joined_factors(parts)
        magnitude = torch.cat([parts[index].magnitude for index in sorted(parts)])
        return replace(next(iter(parts.values())), down=down, up=up, alpha=alpha, magnitude=magnitude)

    @classmethod
    def read(cls, parts: LayerParts) -> Self:
        down, up = parts.matrices("down", "up")
        scale = parts.tensors.get("dora_scale")
        if scale is not None and scale.ndim > 1 and scale.shape[0] != scale.numel():
            raise ValueError("its DoRA magnitudes are per input column, and only those per output row are supported")
        magnitude = parts.tensors["magnitude"] if scale is None else parts.tensors.get("magnitude", scale)
        return cls(
            down=down, up=up, alpha=parts.alpha(down.shape[0]), magnitude=magnitude.flatten(),
            base_norm=parts.metadata.get(_NORM_KEY) == "base",
        )  # fmt: skip

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        if form == "diffusers":  # with peft's axes
            name, axes = "lora_magnitude_vector.weight", (1, -1, 1, 1) if patches else (-1,)
        else:  # one axis for each of the weight's, for broadcasting
            name, axes = "dora_scale", (-1, 1, 1, 1) if patches else (-1, 1)
        return LoRADelta.file_tensors(self, form, patches=patches) | {name: self.magnitude.view(axes)}

    def notes(self) -> dict[str, str]:
        return {_NORM_KEY: "base"} if self.base_norm else {}

    def suits(self, form: Form) -> bool:
        return self.base_norm == (form in ("comfyui", "comfyui-generic"))

    def suited(self, form: Form, weight_OI: Tensor) -> Self:
        if self.suits(form):
            return self
        other = replace(self, base_norm=not self.base_norm)
        ratio_O = self._norms(weight_OI) / other._norms(weight_OI)
        return replace(other, magnitude=self.magnitude.float() / ratio_O)


def merged_row_norms(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """Returns sqrt(|w|^2 + 2 s <w, b A> + s^2 |b A|^2) for each row w of W and b of up, in fp32."""
    weight_OI, down_RI, up_OR = weight_OI.float(), down_RI.float(), up_OR.float()
    crossed_O = ((weight_OI @ down_RI.T) * up_OR).sum(1)
    squared_O = ((up_OR @ (down_RI @ down_RI.T)) * up_OR).sum(1)
    total_O = weight_OI.square().sum(1) + 2.0 * scale * crossed_O + scale * scale * squared_O
    return total_O.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
