"""Brings DoRA magnitudes into the form that the reading program expects, which takes the base's weights."""

# O out features, I in features

from pathlib import Path

import torch

from sd3pipe.adapters.deltas import Adapter, Delta, LoRADelta, with_norm_of
from sd3pipe.adapters.keymap import Form, is_text_encoder
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.weights import read_tensors


def find_base(model: str | None, mmdit: Path | None, why: str) -> ComponentSource:
    """Returns the base model's MMDiT. Raises ParameterError where none was named, InputError where there is none."""
    if model is None and mmdit is None:
        raise ParameterError(f"{why}: pass --model")
    return find_component("mmdit", model=model, file=mmdit)


def for_form(adapter: Adapter, form: Form, model: str | None, mmdit: Path | None) -> dict[str, Delta]:
    """Returns the adapter with its magnitudes, if it has any, over the norms that the form's readers divide by.

    ComfyUI divides by the norms of the base's rows, peft and diffusers by those of the changed rows.
    """
    base_norm = form != "diffusers"
    odd = [path for path, delta in adapter.items() if _needs_change(delta, base_norm)]
    if not odd:
        return dict(adapter)
    program = "ComfyUI" if base_norm else "diffusers"
    source = find_base(model, mmdit, f"this is a DoRA, and its magnitudes for {program} depend on the base model")
    return dict(adapter) | {path: _changed(path, adapter[path], source, base_norm) for path in odd}


def _needs_change(delta: Delta, base_norm: bool) -> bool:
    return isinstance(delta, LoRADelta) and delta.magnitude is not None and delta.base_norm != base_norm


def _changed(path: str, delta: Delta, source: ComponentSource, base_norm: bool) -> LoRADelta:
    assert isinstance(delta, LoRADelta)
    key = f"{path}.weight"
    if is_text_encoder(path) or key not in source.tensors:
        raise InputError(f"{source.where}: has no {path}, which the DoRA changes: it belongs to another model")
    weight_OI = read_tensors(source, dtype=torch.float32, keys=[key])[key].flatten(1)
    if tuple(weight_OI.shape) != delta.shape:
        raise InputError(f"{source.where}: {path} has another size than in the DoRA, which belongs to another model")
    return with_norm_of(delta, weight_OI, base_norm=base_norm)
