"""Options of `sd3pipe encode-latents`."""

from typing import Annotated

from pydantic import BeforeValidator, model_validator

from sd3pipe.params.fields import OptionPath, option
from sd3pipe.params.stage import ENGINE, RAY_WORKERS, SHARD, Shard, StageParams, check_engine
from sd3pipe.words import Engine, Format, LatentMode

_PATHS, _LATENTS, _RUN, _BROKEN = "Paths", "Latents", "This run", "Unreadable pictures"


class EncodeLatentsParams(StageParams):
    # fmt: off
    model: str | None = option(
        None, "Checkpoint file, diffusers folder or hub id that holds the VAE.",
        role="path", panel=_PATHS, aliases=("pretrained_model_name_or_path",), paths_key="model",
    )
    vae: OptionPath | None = option(
        None, "VAE file; beats the one in the model.", role="path", panel=_PATHS, paths_key="vae"
    )
    dataset: OptionPath = option(
        ..., "Dataset file (TOML or JSON), as sd-scripts reads it.",
        role="path", panel=_PATHS, aliases=("dataset_config",), paths_key="dataset",
    )
    out: OptionPath = option(
        ..., "Folder of the cache that is filled.", role="path", panel=_PATHS, paths_key="caches/latents"
    )
    latent_mode: LatentMode = option(
        "moments", "What a row holds: moments, from which training draws afresh, or their mean alone at half the size.",
        role="recipe", panel=_LATENTS,
    )
    latent_dtype: Format = option(
        "float16", "Number format of the rows; float16 is checked for range.", role="recipe", panel=_LATENTS
    )
    vae_dtype: Format = option("float32", "Number format that the VAE computes in.", role="recipe", panel=_LATENTS)
    crop_variants: int = option(
        4, "Rows per picture of a subset with random_crop or face_crop_aug_range.",
        role="recipe", panel=_LATENTS, ge=1,
    )
    seed: int = option(42, "Seed of the random crops.", role="recipe", panel=_LATENTS, ge=0)
    vae_batch_size: int = option(1, "Pictures that go through the VAE at once.", panel=_RUN, ge=1)
    max_data_loader_n_workers: int | None = option(
        None, "Processes that decode pictures ahead; 0: none beside the main one. Default: the cores, at most 8.",
        panel=_RUN, advanced=True, aliases=("workers",), ge=0,
    )
    dry_run: bool = option(False, "Only tell what would be encoded, how long it takes and how big it is.", panel=_RUN)
    shard: Shard | None = SHARD
    engine: Engine = ENGINE
    ray_workers: int | None = RAY_WORKERS
    rehash: bool = option(
        False, "Read every picture and weight file anew instead of trusting times and sizes, and try unreadable ones "
        "again.", panel=_RUN, advanced=True, aliases=("verify_weights",),
    )
    max_quarantined: Annotated[str, BeforeValidator(str)] = option(
        "1%", "How many unreadable pictures are left out without failing (exit 5): a number, or a share with % (at "
        "least 1).", panel=_BROKEN, pattern=r"^(\d+|\d+(\.\d+)?%)$",
    )
    strict: bool = option(False, "Fail (exit 5) for a single unreadable picture.", panel=_BROKEN)
    # fmt: on

    @model_validator(mode="after")
    def _options_agree(self) -> "EncodeLatentsParams":
        check_engine(self.engine, self.shard, self.ray_workers)
        return self

    def quarantine_limit(self, pictures: int) -> int:
        """Returns how many of so many source pictures may be unreadable."""
        if self.strict:
            return 0
        if self.max_quarantined.endswith("%"):
            return max(1, int(pictures * float(self.max_quarantined[:-1]) / 100))
        return int(self.max_quarantined)
