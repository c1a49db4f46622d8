"""Tensors of an adapter file <-> the adapter as factors by native module path, for every form that others write."""

# O out features, I in features, R rank

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from sd3pipe.adapters.deltas import Adapter, Delta, Factor, LoHaDelta, LoKrDelta, LoRADelta
from sd3pipe.adapters.fusing import fold_alpha, join_qkv, split_qkv, swap_halves
from sd3pipe.adapters.keymap import Form, Place, find_place, halves_swapped, module_names
from sd3pipe.adapters.sizes import depth_of
from sd3pipe.errors import InputError, ParameterError

Strength: TypeAlias = Callable[
    [str, int | None], float | None
]  # (module name, rank if it shows) -> factor of the change

PATCH_EMBEDDER = "x_embedder.proj"  # a 2 x 2 convolution, whose factors files keep with those axes
PATCH = 2
DIFFUSERS_ORDER: tuple[Form, ...] = ("diffusers", "onetrainer", "lycoris")

_TUCKER_CORES = (
    "lora_mid.weight",
    "hada_t1",
    "hada_t2",
    "lokr_t2",
)  # of convolutions that are decomposed along all axes
_NAMES_OF_PARTS = {
    "down": ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora_A", "lora.down.weight",
             "lora_linear_layer.down.weight"),
    "up": ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora_B", "lora.up.weight",
           "lora_linear_layer.up.weight"),
    "alpha": ("alpha",),
    "dora_scale": ("dora_scale",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
    **{f"hada_{name}": (f"hada_{name}",) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{name}": (f"lokr_{name}",) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{name: (name,) for name in _TUCKER_CORES},
}  # fmt: skip
_SUFFIXES = {f".{name}": part for part, names in _NAMES_OF_PARTS.items() for name in names} | {
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
_MATRICES = ("down", "up", "hada_", "lokr_")
_SUFFIX = re.compile("|".join(re.escape(suffix) + "$" for suffix in sorted(_SUFFIXES, key=len, reverse=True)))


@dataclass(slots=True)
class Parsed:
    """What the tensors of a file say. `unknown` are the keys that stand for nothing in an SD3 model.

    `modules` is the number of modules as the file has them, q, k and v apart or not; `unknown_modules` are the others.
    """

    forms: set[Form] = field(default_factory=set)
    adapter: dict[str, Delta] = field(default_factory=dict)
    modules: int = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def unknown_modules(self) -> set[str]:
        return {_module_of(key) or key.rpartition(".")[0] or key for key in self.unknown}


def parse(
    tensors: Mapping[str, Tensor], *, strength: Strength = lambda name, rank: None, base_norm: bool = False
) -> Parsed:
    """Returns the adapter that the tensors describe, in the native layout. Raises InputError where they contradict.

    `strength` is what metadata says of a module without alpha; `base_norm` what it says of DoRA's magnitudes.
    """
    parsed = Parsed()
    places: dict[str, dict[int | None, tuple[Place, Delta]]] = {}
    for name, parts in _modules(tensors, parsed.unknown).items():
        place = find_place(name)
        if place is None:
            parsed.unknown += sorted(key for key in tensors if _module_of(key) == name)
            continue
        delta = _delta(name, parts, strength, base_norm=base_norm)
        if place.part in places.setdefault(place.path, {}):
            raise InputError(f"two sets of keys adapt {place.path}: {name} is the second")
        places[place.path][place.part] = (place, delta)
        parsed.modules += 1
        parsed.forms.add(place.form)
    joined = {path: _joined(path, found) for path, found in places.items()}
    depth = _depth({path: delta for path, (_, delta) in joined.items()})
    for path, (form, delta) in joined.items():
        exchanged = form in DIFFUSERS_ORDER and halves_swapped(path, depth)
        parsed.adapter[path] = swap_halves(delta) if exchanged else delta
    return parsed


def tensors_of(adapter: Adapter, form: Form) -> dict[str, Tensor]:
    """Returns the tensors of a file in one of the written forms, for an adapter as prepared() leaves it."""
    if form == "diffusers":
        return _diffusers_tensors(adapter)
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.items():
        (name,) = module_names(path, form)
        tensors |= {f"{name}.{part}": tensor for part, tensor in _native_parts(path, delta, form).items()}
    return tensors


def prepared(adapter: Adapter, form: Form) -> dict[str, Delta]:
    """Returns the adapter as the factors that a form holds: diffusers' has no alpha, so it is folded in.

    Raises ParameterError for kinds of adapters that the form cannot hold.
    """
    if form != "diffusers":
        return dict(adapter)
    result: dict[str, Delta] = {}
    for path, delta in adapter.items():
        if not isinstance(delta, LoRADelta):
            raise ParameterError(
                f"diffusers has no form for {delta.algorithm} ({path}): export it as comfyui, or turn it into a LoRA "
                "with `sd3pipe adapter resize --rank N`"
            )
        if delta.base_norm:
            raise ParameterError("this DoRA was exported for ComfyUI: --model is needed to turn its magnitudes back")
        if path.startswith("text_encoders.t5xxl."):
            raise ParameterError(f"diffusers loads no LoRA into T5, and the adapter has {path}")
        result[path] = fold_alpha(delta)
    return result


def _modules(tensors: Mapping[str, Tensor], unknown: list[str]) -> dict[str, dict[str, Tensor]]:
    """Groups tensors by module name and by what they are to it; keys that are neither go to `unknown`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _SUFFIX.search(key)
        if match is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(key[: match.start()], {})
        part = _SUFFIXES[match[0]]
        if part in parts:
            raise InputError(f"{key} stands for something that another key gave already")
        parts[part] = tensor
    return modules


def _module_of(key: str) -> str | None:
    match = _SUFFIX.search(key)
    return key[: match.start()] if match else None


def _delta(name: str, parts: Mapping[str, Tensor], strength: Strength, *, base_norm: bool) -> Delta:
    try:
        delta = _delta_of(parts, partial(strength, name), base_norm=base_norm)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    damaged = [part for part, tensor in parts.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise InputError(
            f"{name}: {damaged[0]} has values that are not finite: the file is damaged, or training diverged"
        )
    return delta


def _delta_of(parts: Mapping[str, Tensor], strength: Callable[[int | None], float | None], *, base_norm: bool) -> Delta:
    kinds = {"lora" if part in ("down", "up") else part[:4] for part in parts} - {"alph", "dora", "magn"}
    if len(kinds) != 1:
        raise ValueError(f"its tensors ({', '.join(sorted(parts))}) make no adapter layer")
    if parts.keys() & set(_TUCKER_CORES):
        raise ValueError("its convolution is decomposed along all axes (Tucker), which is not supported")
    matrices = {part: _as_matrix(part, tensor) for part, tensor in parts.items() if part.startswith(_MATRICES)}
    alpha = _one_number(parts["alpha"]) if "alpha" in parts else None
    magnitude = _magnitude(parts)
    match kinds.pop():
        case "lora":
            _require(parts, "down", "up")
            rank = matrices["down"].shape[0]
            alpha = _alpha(alpha, strength, rank)
            return LoRADelta(
                down=matrices["down"], up=matrices["up"], alpha=alpha, magnitude=magnitude,
                base_norm=base_norm and magnitude is not None,
            )  # fmt: skip
        case kind if magnitude is not None:
            raise ValueError(f"a magnitude (DoRA) over {kind} factors is not supported")
        case "hada":
            names = ("w1_a", "w1_b", "w2_a", "w2_b")
            _require(parts, *(f"hada_{name}" for name in names))
            w1_a, w1_b, w2_a, w2_b = (matrices[f"hada_{name}"] for name in names)
            return LoHaDelta(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=_alpha(alpha, strength, w1_b.shape[0]))
        case _:
            w1, w2 = _factor(matrices, "lokr_w1"), _factor(matrices, "lokr_w2")
            delta = LoKrDelta(w1=w1, w2=w2, alpha=1.0 if alpha is None else alpha)
            if delta.rank:
                return replace(delta, alpha=_alpha(alpha, strength, delta.rank))
            scale = strength(None) if alpha is None else None  # LyCORIS gives whole factors no scale, peft its own
            return delta if scale is None else replace(delta, w1=_whole(w1).float() * scale)


def _as_matrix(part: str, tensor: Tensor) -> Tensor:
    """Returns a factor as a matrix. Raises ValueError where it has no rows, no columns or no axes for them."""
    if tensor.ndim < 2 or not tensor.numel():
        raise ValueError(f"{part} has the shape {list(tensor.shape)}, and with it the layer no rank")
    return tensor.flatten(1)


def _whole(factor: Factor) -> Tensor:
    assert isinstance(factor, Tensor), "a LoKr whose tensors show no rank has whole factors"
    return factor


def _one_number(alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise ValueError(f"alpha has the shape {list(alpha.shape)} and should be one number")
    return float(alpha.float())


def _alpha(alpha: float | None, strength: Callable[[int | None], float | None], rank: int) -> float:
    """Returns the alpha of a layer: its own, else by the metadata's strength, else the rank, as ComfyUI has it."""
    if alpha is not None:
        return alpha
    scale = strength(rank)
    return float(rank) if scale is None else scale * rank


def _factor(matrices: Mapping[str, Tensor], name: str) -> Factor:
    if name in matrices:
        return matrices[name]
    _require(matrices, f"{name}_a", f"{name}_b")
    return matrices[f"{name}_a"], matrices[f"{name}_b"]


def _magnitude(parts: Mapping[str, Tensor]) -> Tensor | None:
    """Returns DoRA's magnitudes [O]; LyCORIS can also have them per input column, which nothing here computes."""
    scale = parts.get("dora_scale")
    if scale is not None and scale.ndim > 1 and scale.shape[0] != scale.numel():
        raise ValueError("its DoRA magnitudes are per input column, and only those per output row are supported")
    found = parts.get("magnitude", scale)
    return None if found is None else found.flatten()


def _require(parts: Mapping[str, object], *names: str) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing beside {', '.join(sorted(parts))}")


def _joined(path: str, found: Mapping[int | None, tuple[Place, Delta]]) -> tuple[Form, Delta]:
    place, whole = next(iter(found.values()))
    parts = {part: delta for part, (_, delta) in found.items() if part is not None}
    if not parts:
        return place.form, whole
    if len(parts) < len(found):
        raise InputError(f"{path} is adapted as a whole and in parts")
    try:
        return place.form, join_qkv(parts)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _native_parts(path: str, delta: Delta, form: Form) -> dict[str, Tensor]:
    alpha = {"alpha": torch.tensor(delta.alpha, dtype=torch.float32)}
    if isinstance(delta, LoRADelta):
        names = ("lora_down.weight", "lora_up.weight") if form == "comfyui" else ("lora_A.weight", "lora_B.weight")
        pair = dict(zip(names, _with_patch_axes(path, delta), strict=True))
        axes = (-1, 1, 1, 1) if path == PATCH_EMBEDDER else (-1, 1)  # one per axis of the weight, for broadcasting
        magnitude = {} if delta.magnitude is None else {"dora_scale": delta.magnitude.view(axes)}
        return pair | alpha | magnitude
    prefix = "hada" if isinstance(delta, LoHaDelta) else "lokr"
    return {f"{prefix}_{name}": tensor for name, tensor in delta.tensors().items()} | alpha


def _diffusers_tensors(adapter: Adapter) -> dict[str, Tensor]:
    depth = _depth(adapter)
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.items():
        assert isinstance(delta, LoRADelta) and delta.scale == 1.0, "prepared() folds alpha in, and refuses other kinds"
        if halves_swapped(path, depth):
            swapped = swap_halves(delta)
            assert isinstance(swapped, LoRADelta)
            delta = swapped
        names = module_names(path, "diffusers")
        for name, part in zip(names, split_qkv(delta) if len(names) > 1 else (delta,), strict=True):
            down, up = _with_patch_axes(path, part)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            if part.magnitude is not None:
                axes = (1, -1, 1, 1) if path == PATCH_EMBEDDER else (-1,)  # as peft has them
                tensors[f"{name}.lora_magnitude_vector.weight"] = part.magnitude.view(axes)
    return tensors


def _with_patch_axes(path: str, delta: LoRADelta) -> tuple[Tensor, Tensor]:
    """Returns down and up, for the patch embedder as the convolutions that other programs have there."""
    if path != PATCH_EMBEDDER:
        return delta.down, delta.up
    return delta.down.unflatten(1, (-1, PATCH, PATCH)), delta.up[:, :, None, None]


def _depth(adapter: Adapter) -> int:
    return depth_of({path: delta.shape for path, delta in adapter.items()})
