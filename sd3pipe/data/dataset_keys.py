"""Every key of a dataset file: its type, range, default and where it may stand, and the keys that are refused.

Names, types and defaults are sd-scripts' (revision 48d368fa), except that caption_extension defaults to .txt, then
.caption. Keys that sd-scripts does not have are marked `own`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["general", "datasets", "subsets"]
Kind = Literal["bool", "int", "number", "str", "size", "range", "extensions", "colour", "table"]

ALL_LEVELS: tuple[Level, ...] = ("general", "datasets", "subsets")
DATASET_LEVELS: tuple[Level, ...] = ("general", "datasets")
SUBSET_LEVEL: tuple[Level, ...] = ("subsets",)

PRESERVATION = "diff_output_preservation"  # the one custom attribute that sd-scripts reads
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a key may hold. A value of None means that the key is absent."""

    kind: Kind
    default: Any = None
    levels: tuple[Level, ...] = ALL_LEVELS
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    own: bool = False


def _rate(**more: Any) -> Key:
    return Key(kind="number", default=0.0, minimum=0, maximum=1, **more)


KEYS: Mapping[str, Key] = {
    # one value per dataset
    "resolution": Key(kind="size", levels=DATASET_LEVELS, minimum=16),
    "enable_bucket": Key(kind="bool", default=False, levels=DATASET_LEVELS),
    "min_bucket_reso": Key(kind="int", default=256, levels=DATASET_LEVELS, minimum=16),
    "max_bucket_reso": Key(kind="int", default=1024, levels=DATASET_LEVELS, minimum=16),
    "bucket_reso_steps": Key(kind="int", default=64, levels=DATASET_LEVELS, minimum=16),
    "bucket_no_upscale": Key(kind="bool", default=False, levels=DATASET_LEVELS),
    "batch_size": Key(kind="int", levels=DATASET_LEVELS, minimum=1),
    "network_multiplier": Key(kind="number", default=1.0, levels=DATASET_LEVELS),
    # one value per subset, inherited from the dataset and from [general]
    "validation_split": _rate(),
    "validation_seed": Key(kind="int"),
    "resize_interpolation": Key(kind="str", choices=INTERPOLATIONS),
    "num_repeats": Key(kind="int", default=1, minimum=1),
    "shuffle_caption": Key(kind="bool", default=False),
    "caption_separator": Key(kind="str", default=","),
    "keep_tokens": Key(kind="int", default=0, minimum=0),
    "keep_tokens_separator": Key(kind="str", default=""),
    "secondary_separator": Key(kind="str", default=""),
    "enable_wildcard": Key(kind="bool", default=False),
    "caption_prefix": Key(kind="str", default=""),
    "caption_suffix": Key(kind="str", default=""),
    "caption_dropout_rate": _rate(),
    "caption_dropout_every_n_epochs": Key(kind="int", default=0, minimum=0),
    "caption_tag_dropout_rate": _rate(),
    "caption_extension": Key(kind="extensions"),
    "class_tokens": Key(kind="str"),
    "cache_info": Key(kind="bool", default=False),
    "flip_aug": Key(kind="bool", default=False),
    "random_crop": Key(kind="bool", default=False),
    "color_aug": Key(kind="bool", default=False),
    "face_crop_aug_range": Key(kind="range", minimum=0),
    "token_warmup_min": Key(kind="int", default=1, minimum=0),
    "token_warmup_step": Key(kind="number", default=0, minimum=0),
    "custom_attributes": Key(kind="table"),
    "alpha_mask": Key(kind="bool", default=False),
    "alpha_background": Key(kind="colour", own=True),
    "prior_loss_weight": Key(kind="number", minimum=0, own=True),  # without it, train's option counts
    "loss_weight": Key(kind="number", default=1.0, minimum=0, own=True),
    "recursive": Key(kind="bool", default=False, own=True),
    # of one subset alone
    "name": Key(kind="str", levels=SUBSET_LEVEL, own=True),
    "image_dir": Key(kind="str", levels=SUBSET_LEVEL),
    "metadata_file": Key(kind="str", levels=SUBSET_LEVEL),
    "conditioning_data_dir": Key(kind="str", levels=SUBSET_LEVEL),
    "is_reg": Key(kind="bool", default=False, levels=SUBSET_LEVEL),
}

ELSEWHERE: Mapping[str, str] = {
    "train_batch_size": "stages/train.toml",
    "masked_loss": "stages/train.toml (a conditioning_data_dir or alpha_mask here is enough to store masks)",
    "max_token_length": "stages/encode_text.toml, as t5xxl_max_token_length",
    "caption_variants": "stages/encode_text.toml",
    "crop_variants": "stages/encode_latents.toml",
    "vae_batch_size": "stages/encode_latents.toml",
    "dataset_repeats": "num_repeats of the subset",
    "train_data_dir": "[[datasets.subsets]], as image_dir",
    "reg_data_dir": "[[datasets.subsets]], as image_dir with is_reg = true",
    "in_json": "[[datasets.subsets]], as metadata_file",
}


def refusal(key: str, value: Any) -> str | None:
    """Returns why a well-typed value cannot be honoured, or None."""
    if key == "color_aug" and value:
        return (
            "colours would be drawn anew at every access, which a cache of encoded pictures cannot do: remove it, or "
            "put recoloured copies into a subset of their own"
        )
    if key == "token_warmup_step" and value:
        return (
            "the number of tags would depend on the training step, but captions are encoded before training: remove "
            "it, or use caption_tag_dropout_rate with caption_variants"
        )
    if key == "network_multiplier" and value != 1.0:
        return "SD3 training in sd-scripts does not use it either: remove it, or weight the subset with loss_weight"
    if key == "custom_attributes" and (strange := sorted(set(value) - {PRESERVATION})):
        return f"{', '.join(map(ascii, strange))}: nothing reads this: {PRESERVATION} is the only attribute that acts"
    if key == "custom_attributes" and not isinstance(value.get(PRESERVATION, False), bool):
        return f"{PRESERVATION} must be true or false"
    return None


def remark(key: str, value: Any) -> str | None:
    """Returns what to tell about a key that is taken but acts elsewhere or in another way, or None."""
    if key == "batch_size":
        return f"the batch size belongs to training: write train_batch_size = {value} into stages/train.toml"
    if key == "cache_info" and value:
        return "sizes are remembered anyway; captions are read afresh each time, so that no edit goes unseen"
    if key == "token_warmup_min" and value != 1:
        return "without token_warmup_step it changes nothing"
    return None
