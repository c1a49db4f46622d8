"""The adapter between two models of one architecture, module by module, so that one weight of each is in memory."""

from dataclasses import dataclass

import torch

from sd3pipe.adapters.algebra import Approximation, approximate
from sd3pipe.adapters.keymap import native_block
from sd3pipe.console import progress
from sd3pipe.errors import InputError
from sd3pipe.models.sources import ComponentSource
from sd3pipe.tensors.reader import read_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """`left_out` is the squared norm of what no module of the adapter holds: biases, norms, layers not asked for."""

    found: dict[str, Approximation]
    left_out: float


def extract(
    tuned: ComponentSource, base: ComponentSource, *, rank: int, energy: float | None, embedders: bool
) -> Extracted:
    """Returns LoRAs near the difference of two models. Raises InputError where they differ in kind or not at all."""
    ours, theirs = tuned.shapes(), base.shapes()
    odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if odd:
        raise InputError(f"{tuned.where} was not tuned from {base.where}: {odd[0]} is only in one, or of another size")
    found: dict[str, Approximation] = {}
    left_out = 0.0
    with progress("extract", len(tuned.tensors), "tensors") as bar:
        for key in tuned.tensors:
            after = read_tensors(tuned.tensors, dtype=torch.float32, keys=[key])[key]
            change = after - read_tensors(base.tensors, dtype=torch.float32, keys=[key])[key]
            squared = float(torch.linalg.vector_norm(change.double()).square())
            path = key.removesuffix(".weight")
            is_layer = change.ndim > 1 and path not in (key, "pos_embed")
            if squared and is_layer and (embedders or native_block(path) is not None):
                found[path] = approximate(change.flatten(1), rank=rank, energy=energy)
            else:
                left_out += squared
            bar.advance()
    if not found:
        raise InputError(f"{tuned.where} and {base.where} do not differ in any layer that an adapter changes")
    return Extracted(found=found, left_out=left_out)
