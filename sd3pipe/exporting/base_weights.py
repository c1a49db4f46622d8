"""Brings adapters whose change depends on the base into the numbers that a form's readers expect."""

# O out features, I in features

from pathlib import Path

import torch

from sd3pipe.adapters.keymap import Form, is_text_encoder
from sd3pipe.adapters.kind import Adapter, Delta, plain_adapter
from sd3pipe.adapters.sizes import same_size
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.tensors.reader import read_tensors


def find_base(model: str | None, mmdit: Path | None, why: str) -> ComponentSource:
    """Returns the base model's MMDiT. Raises ParameterError where none was named, InputError where there is none."""
    if model is None and mmdit is None:
        raise ParameterError(f"{why}: pass --model")
    return find_component("mmdit", model=model, file=mmdit)


def for_form(adapter: Adapter, form: Form, model: str | None, mmdit: Path | None) -> dict[str, Delta]:
    """Returns the adapter in numbers that the form's readers act by as is meant.

    With a DoRA's magnitudes ComfyUI divides by the norms of the base's rows, peft and diffusers by those of the
    changed rows; of turned inputs ComfyUI reads only the change written out.
    """
    adapter = plain_adapter(adapter)
    odd = [path for path, delta in adapter.items() if not delta.suits(form)]
    if not odd:
        return dict(adapter)
    program = "diffusers" if form == "diffusers" else "ComfyUI"
    kind = adapter[odd[0]].title
    source = find_base(model, mmdit, f"this is a {kind}, and what {program} reads of it depends on the base model")
    suited = dict(adapter)
    for path in odd:
        key = f"{path}.weight"
        if is_text_encoder(path) or key not in source.tensors:
            raise InputError(f"{source.where}: has no {path}, which the adapter changes: it belongs to another model")
        weight_OI = read_tensors(source.tensors, dtype=torch.float32, keys=[key])[key].flatten(1)
        if not same_size(tuple(weight_OI.shape), adapter[path].shape):
            raise InputError(
                f"{source.where}: {path} has another size than in the adapter: it belongs to another model"
            )
        suited[path] = adapter[path].suited(form, weight_OI)
    return suited
