"""Latents of drawn pictures, kept once for whoever draws the same again: `sample`, `judge`, a training's samples.

A picture is known by everything that it is made from: base, adapter file and strength, prompt rows, seed, size, steps,
guidance, number format. The store lies beside the caches and belongs to the machine, as their unused rows do; deleting
it costs only the time to draw again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from sd3pipe.cache.folder import machine_folder
from sd3pipe.diffusion.prompts import SamplePrompt
from sd3pipe.diffusion.sampler import SamplingSettings
from sd3pipe.documents import DocumentError, read_data
from sd3pipe.files import write_bytes
from sd3pipe.fingerprint import hash_json
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.words import Precision

_NAME = "pictures"
_ADAPTER_DIGITS = 16  # of its hash, in what a picture says of itself


class PictureStore:
    """The folder of kept latents; where there is none that can be written, nothing is kept or found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, prompts: Path) -> "PictureStore":
        """Returns the store that all who draw from the prompt caches of a folder share."""
        return cls(shared_folder(prompts, _NAME))

    def file(self, key: str) -> Path:
        """Returns where the latents of a picture lie."""
        assert self.folder is not None, "there is no store"
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.folder is not None and self.file(key).is_file()

    def keep(self, key: str, drawn: Path) -> None:
        """Copies the file of a drawn picture into the store. Raises StorageError."""
        if self.folder is not None and not self.has(key):
            write_bytes(self.file(key), read_data(drawn))

    def fetch(self, key: str, to: Path) -> bool:
        """Copies a picture's file out of the store, and returns whether there was one."""
        if not self.has(key):
            return False
        try:
            data = read_data(self.file(key))
        except DocumentError:  # deleted, or not to be read: it is drawn again
            return False
        write_bytes(to, data)
        return True


def shared_folder(cache: Path, name: str) -> Path | None:
    """Returns the machine's folder of a name beside a cache, None where nothing can be written there."""
    parent = cache.absolute().parent
    return machine_folder(parent / name) if os.access(parent, os.W_OK) else None


def made_from(
    prompt: SamplePrompt, settings: SamplingSettings, architecture: MMDiTArchitecture, base: str, precision: Precision
) -> dict[str, JsonValue]:
    """Returns what a picture is made from beside adapter and seed; `base` is the MMDiT's fingerprint."""
    skip = settings.skip_layers
    return {
        "format": 2,
        "mmdit": base,
        "texts": [prompt.key, prompt.negative_key],
        "size": list(prompt.size(architecture)),
        "steps": settings.steps,
        "scale": settings.scale,
        "skip_layers": None if skip is None else [skip.scale, *skip.blocks],
        "precision": precision,
    }


def picture_key(*, adapter_hash: str, multiplier: float, seed: int, made_from: Mapping[str, Any]) -> str:
    """Returns the hash of all that a picture is made from; the strength of no adapter counts as none."""
    multiplier = multiplier if adapter_hash else 0.0
    return hash_json({"adapter": adapter_hash, "multiplier": multiplier, "seed": seed, **made_from})


def adapter_words(adapter_hash: str, multiplier: float) -> dict[str, object]:
    """Names an adapter by content in what a picture says of itself: who draws the same again calls its file at will."""
    return {"Adapter": adapter_hash[:_ADAPTER_DIGITS], "Adapter strength": f"{multiplier:g}"} if adapter_hash else {}
