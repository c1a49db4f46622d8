"""Tensors of an adapter file <-> the adapter as factors by native module path, for every form that others write."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from sd3pipe.adapters.apart import join_qkv
from sd3pipe.adapters.fusing import swapped_halves
from sd3pipe.adapters.keymap import Form, NativeModule, find_native_module, halves_swapped, module_names
from sd3pipe.adapters.kind import Adapter, Delta
from sd3pipe.adapters.kinds import KINDS
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.sizes import depth_of
from sd3pipe.errors import InputError, ParameterError

# (module name, rank if it shows) -> factor of the change
Strength: TypeAlias = Callable[[str, int | None], float | None]

PATCH_EMBEDDER = "x_embedder.proj"
DIFFUSERS_ORDER: tuple[Form, ...] = ("diffusers", "onetrainer", "lycoris")

# Ends of keys of what is not read, with what it is, in LyCORIS, peft and OneTrainer.
_NOT_READ: Mapping[str, str] = {
    end: what
    for what, ends in {
        "a convolution in Tucker's decomposition": ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"),
        "a LoRA with a bias of its own (peft's lora_bias)": ("lora_B.bias", "lora_B.default.bias", "lora_up.bias"),
        "an OFT of another form": ("oft_diag", "oft_r", "oft_s", "rescale"),
        "a BOFT": ("boft_R", "boft_s"),
        "a GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
        "an IA3": ("on_input", "ia3_l"),
    }.items()
    for end in ends
}


@dataclass(slots=True)
class Parsed:
    """What the tensors of a file say. `unknown` are the keys that stand for nothing in an SD3 model.

    `modules` is the number of modules as the file has them, q, k and v apart or not; `unknown_modules` are the others.
    """

    forms: set[Form] = field(default_factory=set)
    adapter: dict[str, Delta] = field(default_factory=dict)
    modules: int = 0
    unknown: list[str] = field(default_factory=list)
    unknown_modules: set[str] = field(default_factory=set)


def parse(
    tensors: Mapping[str, Tensor],
    *,
    strength: Strength = lambda name, rank: None,
    metadata: Mapping[str, str] | None = None,
) -> Parsed:
    """Returns the adapter that the tensors describe, in the native layout. Raises InputError where they contradict.

    `strength` is what the file's configuration says of a module without alpha; `metadata` may hold the kinds' notes.
    """
    parsed = Parsed()
    modules: dict[str, dict[int | None, tuple[NativeModule, Delta]]] = {}
    for name, keys in _modules(tensors, parsed).items():
        module = find_native_module(name)
        if module is None:
            parsed.unknown += sorted(keys.values())
            parsed.unknown_modules.add(name)
            continue
        parts = {part: tensors[key] for part, key in keys.items()}
        delta = _delta(name, LayerParts(tensors=parts, strength=partial(strength, name), metadata=metadata or {}))
        if module.part in modules.setdefault(module.path, {}):
            raise InputError(f"two sets of keys adapt {module.path}: {name} is the second")
        modules[module.path][module.part] = (module, delta)
        parsed.modules += 1
        parsed.forms.add(module.form)
    joined = {path: _joined(path, found) for path, found in modules.items()}
    depth = _depth({path: delta for path, (_, delta) in joined.items()})
    for path, (form, delta) in joined.items():
        exchanged = form in DIFFUSERS_ORDER and halves_swapped(path, depth)
        parsed.adapter[path] = delta.with_rows(swapped_halves) if exchanged else delta
    return parsed


def tensors_of(adapter: Adapter, form: Form) -> dict[str, Tensor]:
    """Returns the tensors of a file in one of the written forms, for an adapter as prepared() leaves it."""
    tensors: dict[str, Tensor] = {}
    depth = _depth(adapter)
    for path, delta in adapter.items():
        names = module_names(path, form)
        if form == "diffusers" and halves_swapped(path, depth):
            delta = delta.with_rows(swapped_halves)
        for index, part in (delta.split() if len(names) > 1 else {0: delta}).items():
            held = part.file_tensors(form, patches=path == PATCH_EMBEDDER)
            if form != "diffusers":
                held["alpha"] = torch.tensor(part.alpha, dtype=torch.float32)
            tensors |= {f"{names[index]}.{end}": tensor for end, tensor in held.items()}
    return tensors


def prepared(adapter: Adapter, form: Form) -> dict[str, Delta]:
    """Returns the adapter as the factors that a form holds. Raises ParameterError for what it cannot hold."""
    of_t5 = [path for path in adapter if path.startswith("text_encoders.t5xxl.")]
    if of_t5 and form == "diffusers":
        raise ParameterError(f"diffusers loads no LoRA into T5, and the adapter has {of_t5[0]}")
    return {path: delta.held_by(form) for path, delta in adapter.items()}


def _modules(tensors: Mapping[str, Tensor], parsed: Parsed) -> dict[str, dict[str, str]]:
    """Groups keys by module name and by what they are to it; what is neither goes to `parsed` as unknown."""
    ends = {end: part for kind in KINDS.values() for part, names in kind.part_names.items() for end in names}
    ends |= {".alpha": "alpha", **{f".{name}": name for name in _NOT_READ}}
    any_end = re.compile("|".join(re.escape(end) + "$" for end in sorted(ends, key=len, reverse=True)))
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = any_end.search(key)
        if match is None:
            parsed.unknown.append(key)
            parsed.unknown_modules.add(key.rpartition(".")[0] or key)
            continue
        keys = modules.setdefault(key[: match.start()], {})
        if ends[match[0]] in keys:
            raise InputError(f"{key} stands for something that another key gave already")
        keys[ends[match[0]]] = key
    return modules


def _delta(name: str, parts: LayerParts) -> Delta:
    try:
        delta = _kind(parts).read(parts)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    damaged = [part for part, tensor in parts.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise InputError(
            f"{name}: {damaged[0]} has values that are not finite: the file is damaged, or training diverged"
        )
    return delta


def _kind(parts: LayerParts) -> type[Delta]:
    """Returns the first kind that has all these parts. Raises ValueError that names kinds which are not read."""
    names = parts.tensors.keys()
    found = next((part for part in sorted(names) if part in _NOT_READ), None)
    if found is not None:
        raise ValueError(
            f"it is {_NOT_READ[found]} ({found}), which is not read: LoRA, DoRA, LoHa, LoKr, OFT and full changes are"
        )
    for kind in KINDS.values():
        if kind.reads(names, parts.metadata):
            return kind
    raise ValueError(f"its tensors ({', '.join(sorted(names))}) make no adapter layer of a known kind")


def _joined(path: str, found: Mapping[int | None, tuple[NativeModule, Delta]]) -> tuple[Form, Delta]:
    module, whole = next(iter(found.values()))
    parts = {part: delta for part, (_, delta) in found.items() if part is not None}
    if not parts:
        return module.form, whole
    if len(parts) < len(found):
        raise InputError(f"{path} is adapted as a whole and in parts")
    if len({delta.shape for delta in parts.values()}) > 1:
        raise InputError(f"{path}: its q, k and v differ in size")
    return module.form, join_qkv(parts)


def _depth(adapter: Adapter) -> int:
    return depth_of({path: delta.shape for path, delta in adapter.items()})
