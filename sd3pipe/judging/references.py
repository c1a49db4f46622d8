"""The training pictures that drawn ones are compared with, decoded from the latents cache: no originals are needed."""

# C latent channels, h w latent pixels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import latents_name
from sd3pipe.cache.tensors import to_torch
from sd3pipe.errors import InputError

MOST = 256  # of each kind; more tell little more, and each has to be decoded and looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One picture of the cache: its first crop, as it lies."""

    name: str
    row: int
    key: str
    held_out: bool


def read_references(latents: CacheReader) -> list[Reference]:
    """Returns training and held-out pictures, at most MOST of each, each once, without regularisation pictures.

    Raises InputError for a cache of another kind, and where there is no training picture.
    """
    if latents.manifest.kind != "latents":
        raise InputError(f"{latents.where} is a cache of {latents.manifest.kind}, not of latents")
    chosen: dict[tuple[str, str], Reference] = {}
    columns = latents.samples.to_columns(latents.keys)
    rows = latents.samples.numbers("row").tolist()
    for place, (name, subset) in enumerate(zip(columns["name"], columns["subset"], strict=True)):
        is_reg = bool(latents.manifest.subsets.get(subset, {}).get("is_reg"))
        if is_reg or columns["flip"][place] or (subset, name) in chosen:
            continue
        chosen[subset, name] = Reference(
            name=name, row=rows[place], key=columns["key"][place], held_out=columns["split"][place] == "validation"
        )
    different = {item.key: item for item in chosen.values()}  # beside its own copy a picture could not be copied
    trained, held_out = ([item for item in different.values() if item.held_out is wanted] for wanted in (False, True))
    if not trained:
        raise InputError(f"{latents.where} holds no picture that is trained on: there is nothing to be alike")
    return [*_spread(trained), *_spread(held_out)]


def mean_latents(latents: CacheReader, row: int) -> torch.Tensor:
    """Returns the unscaled latents [C, h, w] in the middle of a row's distribution, fp32."""
    tensors = latents.row(row)
    name = latents_name(tensors)
    values = to_torch(tensors[name]).float()
    return values.chunk(2)[0] if name == "moments" else values


def _spread(references: Sequence[Reference]) -> Iterator[Reference]:
    """Yields at most MOST of the pictures, chosen by their keys, so that neither order nor names matter."""
    yield from sorted(references, key=lambda item: item.key)[:MOST]
