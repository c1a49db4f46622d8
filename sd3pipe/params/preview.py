"""Options of `sd3pipe preview`."""

from sd3pipe.params.fields import OptionPath, option
from sd3pipe.params.stage import StageParams

_PATHS, _SHOWN = "Paths", "What is shown"


class PreviewParams(StageParams):
    # fmt: off
    dataset: OptionPath | None = option(
        None, "Dataset file (TOML or JSON): draws what would be encoded.",
        role="path", panel=_PATHS, aliases=("dataset_config",), paths_key="dataset",
    )
    latents: OptionPath | None = option(
        None, "Latents cache: draws what was encoded by decoding it, instead of the dataset.",
        role="path", panel=_PATHS,
    )
    out: OptionPath = option(
        "preview", "Folder for the page and one PNG per bucket.", role="path", panel=_PATHS, validate_default=True
    )
    model: str | None = option(
        None, "Checkpoint, diffusers folder or hub id with the VAE that decodes --latents.",
        role="path", panel=_PATHS, aliases=("pretrained_model_name_or_path",), paths_key="model",
    )
    vae: OptionPath | None = option(
        None, "VAE file; beats the one in the model.", role="path", panel=_PATHS, paths_key="vae"
    )
    tokenizers: OptionPath | None = option(
        None, "Folder with the tokenizers: tells which captions are cut off.",
        role="path", panel=_PATHS, paths_key="tokenizers",
    )
    captions: tuple[OptionPath, ...] = option(
        (), "Caches of `caption`: their captions stand in columns below each picture.", role="path", panel=_SHOWN
    )
    pictures_per_bucket: int = option(
        24, "Pictures drawn per bucket, spread evenly over its pictures.", panel=_SHOWN, ge=1, le=500
    )
    caption_variants: int = option(8, "As for encode-text.", panel=_SHOWN, ge=1, le=1000)
    crop_variants: int = option(4, "As for encode-latents.", panel=_SHOWN, ge=1)
    t5xxl_max_token_length: int = option(256, "As for encode-text.", panel=_SHOWN, ge=1, le=512)
    seed: int = option(42, "As for the encode stages.", panel=_SHOWN, ge=0)
    max_data_loader_n_workers: int | None = option(
        None, "Processes that decode pictures; 0: none beside the main one. Default: the cores, at most 8.",
        panel="Machine", advanced=True, aliases=("workers",), ge=0,
    )
