"""Options of `sd3pipe sample`."""

from pydantic import field_validator, model_validator

from sd3pipe.params import stage
from sd3pipe.params.fields import OptionPath, option
from sd3pipe.words import ToldVariant, WantedPrecision

_PATHS, _GRID, _DRAWING = "Paths", "Columns and rows", "Drawing"


class SampleParams(stage.StageParams):
    # fmt: off
    model: str | None = stage.base_model(None)
    mmdit: OptionPath | None = stage.MMDIT
    vae: OptionPath | None = option(
        None, "VAE in a file of its own; beats the one in --model. Without any, latents are kept.",
        role="path", panel=_PATHS, paths_key="vae",
    )
    prompts: OptionPath | None = option(
        None, "Cache of encoded sample prompts.", role="path", panel=_PATHS, paths_key="caches/prompts"
    )
    adapter: OptionPath | None = option(
        None, "Adapter to draw with: a run, a checkpoint or a file; without it the base alone is drawn.",
        role="path", panel=_PATHS,
    )
    out: OptionPath = option(..., "Folder for the pictures: one grid per prompt.", role="path", panel=_PATHS)

    checkpoints: str | None = option(
        None, "Checkpoints of the run to draw, a column each: all, every:N (each N-th), or steps such as 250,500.",
        panel=_GRID, pattern=stage.CHECKPOINTS,
    )
    multiplier: str = option(
        "1", "Strengths of the adapter, a column each, such as 0.6,0.8,1.0.",
        panel=_GRID, aliases=("strength",), pattern=stage.NUMBERS,
    )
    seeds: str | None = option(
        None, "Seeds, a row each, such as 1,2; default: each prompt's own (else 42).",
        panel=_GRID, pattern=stage.INTEGERS,
    )
    decode: bool = option(
        False, "Only decode latents that an earlier run kept in --out, with the VAE at hand here.", panel=_DRAWING
    )
    variant: ToldVariant | None = stage.TOLD_VARIANT
    skip_layer_guidance: float | None = option(
        None, "Strength of skip-layer guidance for SD3.5-medium, such as 2.5; default: none.", panel=_DRAWING, ge=0
    )
    skip_layers: str = option(
        "7,8,9", "Blocks that skip-layer guidance leaves out.",
        panel=_DRAWING, advanced=True, pattern=stage.INTEGERS,
    )
    mixed_precision: WantedPrecision = stage.mixed_precision(_DRAWING)
    blocks_to_swap: stage.BlocksToSwap = stage.blocks_to_swap(_DRAWING)
    # fmt: on

    _no_value_twice = field_validator("multiplier", "seeds", "skip_layers")(stage.no_value_twice)

    @model_validator(mode="after")
    def _options_agree(self) -> "SampleParams":
        if self.decode:
            if self.vae is None and self.model is None:
                raise ValueError("--decode needs --vae, or a --model that holds the VAE")
            return self
        if self.prompts is None:
            raise ValueError("--prompts is missing: the cache that `sd3pipe encode-text --sample-prompts` fills")
        if self.model is None and self.mmdit is None:
            raise ValueError("--model is missing")
        if self.adapter is None and (self.checkpoints or self.multiplier != "1"):
            raise ValueError("--checkpoints and --multiplier are about an adapter: name it with --adapter")
        return self

    def multipliers(self) -> tuple[float, ...]:
        return tuple(float(number) for number in self.multiplier.split(","))

    def seed_numbers(self) -> tuple[int, ...] | None:
        return None if self.seeds is None else tuple(int(number) for number in self.seeds.split(","))

    def skipped_blocks(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.skip_layers.split(","))
