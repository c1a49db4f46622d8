"""The sample prompts of a cache, ready to be drawn."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.tensors import to_torch
from sd3pipe.errors import InputError
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.training.sampling import SamplingSettings, TextCondition, start_noise, with_overrides

DEFAULT_SIDE_PX = 1024  # every public SD3 model draws best at this size
DEFAULT_SEED = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One prompt with its settings; None means as the model's variant wants it. Keys identify the encoded texts."""

    name: str
    prompt: str
    text: TextCondition
    negative: TextCondition
    key: str
    negative_key: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    scale: float | None = None
    seed: int | None = None

    def size(self, architecture: MMDiTArchitecture) -> tuple[int, int]:
        """Returns height and width in pixels; by default as large as the model was trained for, at most 1024."""
        default = min(DEFAULT_SIDE_PX, architecture.pos_embed_max * architecture.patch_size * 8)
        return self.height or default, self.width or default

    def noise(self, architecture: MMDiTArchitecture, seed: int | None = None) -> torch.Tensor:
        """Returns the noise [1, C, h, w] that the picture begins with, of the given seed or the prompt's own."""
        height, width = self.size(architecture)
        return start_noise([self.own_seed if seed is None else seed], height_px=height, width_px=width)

    def settings(self, defaults: SamplingSettings) -> SamplingSettings:
        """Returns how this prompt is drawn: its own steps and scale where it names them."""
        return with_overrides(defaults, steps=self.steps, scale=self.scale)

    @property
    def own_seed(self) -> int:
        return DEFAULT_SEED if self.seed is None else self.seed

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[TextCondition, TextCondition]:
        """Returns prompt and negative prompt on the device that draws."""
        return self.text.to(device, dtype), self.negative.to(device, dtype)


def read_prompts(where: str | Path) -> list[SamplePrompt]:
    """Returns the prompts of a cache that `encode-text --sample-prompts` filled, in the order of their names.

    Raises InputError for a cache of another kind.
    """
    reader = CacheReader(where)
    if reader.manifest.kind != "prompts":
        raise InputError(
            f"{where} holds {reader.manifest.kind}, not prompts: fill one with `sd3pipe encode-text --sample-prompts`"
        )
    columns = reader.samples.to_columns(reader.keys)
    conditions = {key: _condition(reader, key) for key in {*columns["key"], *columns["negative_key"]}}
    return [
        SamplePrompt(
            name=columns["name"][number],
            prompt=columns["prompt"][number],
            key=(key := columns["key"][number]),
            negative_key=(negative_key := columns["negative_key"][number]),
            text=conditions[key],
            negative=conditions[negative_key],
            **json.loads(columns["settings"][number]),
        )
        for number in range(len(reader.samples))
    ]


def _condition(reader: CacheReader, key: str) -> TextCondition:
    row = {name: to_torch(tensor) for name, tensor in reader.row(key).items()}
    context_BLD, pooled_BP = assemble_conditioning([row])
    return TextCondition(context=context_BLD, pooled=pooled_BP)
