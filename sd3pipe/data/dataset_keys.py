"""Every key of a dataset file: its type, range, default and where it may stand, and the keys that are refused.

Names, types and defaults are sd-scripts' (revision 48d368fa), except that caption_extension defaults to .txt, then
.caption. Keys that sd-scripts does not have are marked as our own.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

PRESERVATION = "diff_output_preservation"  # the one custom attribute that sd-scripts reads
_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}


def _size(value: Any) -> Any:
    """Returns one side as both."""
    return (value, value) if isinstance(value, int) else _several(2, "a whole number or [width, height]")(value)


def _several(count: int, otherwise: str) -> Callable[[Any], Any]:
    def as_tuple(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"must be {otherwise}")
        return tuple(value)

    return as_tuple


def _colour(value: Any) -> Any:
    if isinstance(value, str) and value in _COLOURS:
        return _COLOURS[value]
    return _several(3, f"{', '.join(_COLOURS)} or [red, green, blue] from 0 to 255")(value)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("must be two rising numbers above 0")
    return value


def _extension(value: Any) -> Any:
    if not (isinstance(value, str) and value and "/" not in value and "\0" not in value):
        raise ValueError("must be an ending such as '.txt'")
    if "." not in value:
        raise ValueError(f"must be an ending such as '.txt', and has no dot: did you mean '.{value}'?")
    return (value,)


def _text(value: Any) -> str:
    """Returns text with any surrogates in it: pydantic's own str refuses how Python holds a name that is not UTF-8."""
    if not isinstance(value, str):
        raise ValueError("must be a valid string")
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


def _attributes(value: dict[str, Any]) -> dict[str, Any]:
    if strange := sorted(set(value) - {PRESERVATION}):
        raise ValueError(
            f"{', '.join(map(ascii, strange))}: nothing reads this: {PRESERVATION} is the only attribute that acts"
        )
    if not isinstance(value.get(PRESERVATION, False), bool):
        raise ValueError(f"{PRESERVATION} must be true or false")
    return value


def _only(neutral: Any, why: str) -> AfterValidator:
    """Refuses every value of a key but the one that asks for nothing."""

    def check(value: Any) -> Any:
        if value != neutral:
            raise ValueError(why)
        return value

    return AfterValidator(check)


Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Count = Annotated[Whole, Field(ge=0)]
Side = Annotated[Whole, Field(ge=16)]
Text = Annotated[str, PlainValidator(_text)]
Rate = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
_NO_COLOURS = (
    "colours would be drawn anew at every access, which a cache of encoded pictures cannot do: remove it, or put "
    "recoloured copies into a subset of their own"
)
_NO_WARMUP = (
    "the number of tags would depend on the training step, but captions are encoded before training: remove it, or "
    "use caption_tag_dropout_rate with caption_variants"
)
_NO_MULTIPLIER = "SD3 training in sd-scripts does not use it either: remove it, or weight the subset with loss_weight"


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _OfDatasets(_Keys):
    """One value per dataset."""

    resolution: Annotated[tuple[Side, Side], BeforeValidator(_size)] | None = None
    enable_bucket: bool = False
    min_bucket_reso: Side = 256
    max_bucket_reso: Side = 1024
    bucket_reso_steps: Side = 64
    bucket_no_upscale: bool = False
    batch_size: Annotated[Whole, Field(ge=1)] | None = None
    network_multiplier: Annotated[float, _only(1.0, _NO_MULTIPLIER)] = 1.0


class _Inherited(_Keys):
    """One value per subset, inherited from the dataset and from [general]."""

    validation_split: Rate = 0.0
    validation_seed: Whole | None = None
    resize_interpolation: Interpolation | None = None
    num_repeats: Annotated[Whole, Field(ge=1)] = 1
    shuffle_caption: bool = False
    caption_separator: Text = ","
    keep_tokens: Count = 0
    keep_tokens_separator: Text = ""
    secondary_separator: Text = ""
    enable_wildcard: bool = False
    caption_prefix: Text = ""
    caption_suffix: Text = ""
    caption_dropout_rate: Rate = 0.0
    caption_dropout_every_n_epochs: Count = 0
    caption_tag_dropout_rate: Rate = 0.0
    caption_extension: Annotated[tuple[str, ...], PlainValidator(_extension)] = (".txt", ".caption")
    class_tokens: Text | None = None
    cache_info: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    color_aug: Annotated[bool, _only(False, _NO_COLOURS)] = False
    face_crop_aug_range: Annotated[
        tuple[float, float], BeforeValidator(_several(2, "[low, high]")), AfterValidator(_rising)
    ] | None = None  # fmt: skip
    token_warmup_min: Count = 1
    token_warmup_step: Annotated[float, Field(ge=0), _only(0, _NO_WARMUP)] = 0
    custom_attributes: Annotated[dict[str, Any], AfterValidator(_attributes)] = {}
    alpha_mask: bool = False
    # our own
    alpha_background: Annotated[
        tuple[Annotated[int, Field(ge=0, le=255)], ...], BeforeValidator(_colour)
    ] | None = None  # fmt: skip
    prior_loss_weight: Weight | None = None  # without it, train's option counts
    loss_weight: Weight = 1.0
    recursive: bool = False
    caption_cache: Text | None = None


class DatasetKeys(_OfDatasets, _Inherited):
    """What may stand in [general] and in [[datasets]]."""


class SubsetKeys(_Inherited):
    """What may stand in [[datasets.subsets]]."""

    name: Text | None = None  # our own
    image_dir: Text | None = None
    metadata_file: Text | None = None
    conditioning_data_dir: Text | None = None
    is_reg: bool = False


class Keys(DatasetKeys, SubsetKeys):
    """All keys: a subset's own and those that it inherits."""


_ELSEWHERE: Mapping[str, str] = {
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


def place_of(key: str) -> str | None:
    """Returns where a key belongs that cannot stand where it was found, or None for one that belongs nowhere."""
    if key in SubsetKeys.model_fields:
        return "cannot stand here: it belongs in [[datasets.subsets]]"
    if key in DatasetKeys.model_fields:
        return "cannot stand here: it belongs in [general] or [[datasets]]"
    return f"belongs to {_ELSEWHERE[key]}" if key in _ELSEWHERE else None


def remark(key: str, value: Any) -> str | None:
    """Returns what to tell about a key that is taken but acts elsewhere or in another way, or None."""
    if key == "batch_size":
        return f"the batch size belongs to training: write train_batch_size = {value} into stages/train.toml"
    if key == "cache_info" and value:
        return "sizes and captions are remembered anyway, and looked at again where a file's stat has changed"
    if key == "token_warmup_min" and value != 1:
        return "without token_warmup_step it changes nothing"
    return None
