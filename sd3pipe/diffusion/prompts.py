"""The sample prompts of a cache, ready to be drawn."""

# B batch, L text tokens, D text width, P pooled width, C latent channels, h w latent pixels

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.tensors import row_to_torch
from sd3pipe.diffusion.sampler import SamplingSettings, TextCondition, sample_latents, start_noise
from sd3pipe.diffusion.sheet import PlainName
from sd3pipe.documents import checked, parse_json
from sd3pipe.errors import InputError
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.prompt_settings import PromptSettings

DEFAULT_SIDE_PX = 1024  # every public SD3 model draws best at this size
DEFAULT_SEED = 42

_NAME, _SETTINGS = TypeAdapter(PlainName), TypeAdapter(PromptSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One prompt with its settings; None means as the model's variant wants it. Keys identify the encoded texts."""

    name: str
    prompt: str
    text: TextCondition
    negative: TextCondition
    key: str
    negative_key: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    scale: float | None = None
    seed: int | None = None

    def size(self, architecture: MMDiTArchitecture) -> tuple[int, int]:
        """Returns height and width in pixels; by default as large as the model was trained for, at most 1024.

        Raises InputError for a side that is larger than the model's position table.
        """
        most = architecture.pos_embed_max * architecture.patch_size * 8
        default = min(DEFAULT_SIDE_PX, most)
        height, width = self.height or default, self.width or default
        if max(height, width) > most:
            raise InputError(
                f"sample prompt {self.name}: {width} x {height} pixels: this model draws at most {most} a side: "
                "choose a smaller size in the prompts' file, then `sd3pipe encode-text --sample-prompts`"
            )
        return height, width

    def noise(self, architecture: MMDiTArchitecture, seed: int | None = None) -> torch.Tensor:
        """Returns the noise [1, C, h, w] that the picture begins with, of the given seed or the prompt's own."""
        height, width = self.size(architecture)
        return start_noise([self.own_seed if seed is None else seed], height_px=height, width_px=width)

    def settings(self, defaults: SamplingSettings) -> SamplingSettings:
        """Returns how this prompt is drawn: its own steps and scale where it names them."""
        own = {name: value for name in ("steps", "scale") if (value := getattr(self, name)) is not None}
        return replace(defaults, **own)

    def parameters(
        self,
        defaults: SamplingSettings,
        architecture: MMDiTArchitecture,
        *,
        seed: int | None = None,
        more: Mapping[str, object],
    ) -> str:
        """Returns what the picture is drawn with, laid out as AUTOMATIC1111's web UI does, which the web's tools read.

        Behind the prompts stands one line of settings, `more` at its end.
        """
        settings, (height, width) = self.settings(defaults), self.size(architecture)
        said: dict[str, object] = {
            "Steps": settings.steps,
            "Sampler": "Euler",
            "CFG scale": f"{settings.scale:g}",
            "Seed": self.own_seed if seed is None else seed,
            "Size": f"{width}x{height}",
            "Shift": f"{settings.shift:g}",
        }
        if settings.skip_layers is not None:
            said["Skip layer guidance"] = f"{settings.skip_layers.scale:g}"
            said["Skipped layers"] = " ".join(map(str, settings.skip_layers.blocks))
        line = ", ".join(f"{name}: {value}" for name, value in {**said, **more}.items())
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, line])

    def drawn(
        self,
        mmdit: MMDiT,
        defaults: SamplingSettings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Returns the unscaled latents [1, C, h, w] of the picture, as `sample_latents` draws them."""
        return sample_latents(
            mmdit,
            self.text.to(device, dtype),
            self.negative.to(device, dtype),
            noise_BChw=self.noise(mmdit.architecture, seed).to(device),
            settings=self.settings(defaults),
            on_step=on_step,
        )

    @property
    def own_seed(self) -> int:
        return DEFAULT_SEED if self.seed is None else self.seed


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
    conditions: dict[str, TextCondition] = {}
    for key in {*columns["key"], *columns["negative_key"]}:
        context_BLD, pooled_BP = assemble_conditioning([row_to_torch(reader.row(key))])
        conditions[key] = TextCondition(context=context_BLD, pooled=pooled_BP)
    return [
        SamplePrompt(
            name=checked(columns["name"][number], _NAME, f"{where}: name of a prompt"),
            prompt=columns["prompt"][number],
            negative_prompt=columns["negative"][number],
            key=(key := columns["key"][number]),
            negative_key=(negative_key := columns["negative_key"][number]),
            text=conditions[key],
            negative=conditions[negative_key],
            **parse_json(columns["settings"][number], _SETTINGS, f"{where}: settings of prompt {number + 1}"),
        )
        for number in range(len(reader.samples))
    ]
