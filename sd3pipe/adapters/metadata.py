"""What a file says of itself: modelspec 1.0.1, sd-scripts' ss_ keys, and under one key what it was made from.

modelspec: github.com/Stability-AI/ModelSpec. All values are strings. No value depends on the time or the machine, but
for the date, which is written only where SOURCE_DATE_EPOCH gives it.
"""

import base64
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, JsonValue, TypeAdapter

from sd3pipe.adapters.kinds import KINDS
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.documents import parse_json, read_data
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.rules.description import Description
from sd3pipe.variants import PUBLIC_MODELS
from sd3pipe.words import MMDiTVariant

PROVENANCE_KEY = "sd3pipe"
MULTIPLIER_KEY = "sd3pipe_multiplier"  # the strength that was written into a file, where it is not 1

_IMPLEMENTATION = "https://github.com/Stability-AI/sd3.5"
_PICTURE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
_LARGEST_THUMBNAIL = 1 << 20

# Options that sd-scripts writes as ss_NAME, under the same name.
KOHYA_OPTIONS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "seed", "mixed_precision", "max_grad_norm",
    "gradient_checkpointing", "gradient_accumulation_steps", "weighting_scheme", "logit_mean", "logit_std",
    "mode_scale", "loss_type", "huber_schedule", "huber_c", "huber_scale", "scale_weight_norms", "prior_loss_weight",
    "network_dropout", "training_shift", "loss_form", "min_timestep", "max_timestep", "training_comment",
    "apply_lg_attn_mask", "apply_t5_attn_mask", "t5xxl_max_token_length",
)  # fmt: skip


class Provenance(BaseModel):
    """What an adapter was made from, enough to make it again; as it is found in a file, it may come from anybody.

    `fingerprints` names base, encoders, tokenizers and caches by content; `parameters` are the options of each command
    ("train", "encode-text", "encode-latents") without paths; `versions` the libraries.
    """

    format: Literal[1]
    version: str = ""
    step: int | None = None
    seed: int | None = None
    fingerprints: dict[str, str] = {}
    parameters: dict[str, dict[str, JsonValue]] = {}
    versions: dict[str, str] = {}


def training_metadata(
    *,
    variant: MMDiTVariant,
    spec: AdapterSpec,
    options: Mapping[str, object],
    step: int,
    epoch: int,
    output_name: str,
    resolution: tuple[int, int] | None,
    provenance: Provenance,
    description: Description,
    dataset: Mapping[str, object],
) -> dict[str, str]:
    """Returns the metadata of an adapter in training.

    `options` are the options of train, and of the encoding of text, by name, `resolution` is (width, height) of the
    largest bucket, `dataset` what sd-scripts says of pictures, by its names.
    """
    kohya: dict[str, object] = {name: options[name] for name in KOHYA_OPTIONS if options.get(name) is not None}
    kohya |= {
        "network_module": KINDS[spec.algorithm].network_module,
        "network_dim": spec.rank,
        "network_alpha": KINDS[spec.algorithm].alpha_of(spec, spec.rank),
        "network_args": json.dumps(network_args(spec), sort_keys=True),
        "base_model_version": PUBLIC_MODELS[variant].kohya_version,
        "unet_lr": options.get("learning_rate"),
        "optimizer": options.get("optimizer_type"),
        "steps": step,
        "epoch": epoch,
        "output_name": output_name,
        "v2": False,
        **dataset,
    }
    keys = {f"ss_{name}": _text(value) for name, value in sorted(kohya.items()) if value is not None}
    if resolution is not None:
        keys["ss_resolution"] = f"({resolution[0]}, {resolution[1]})"
    keys |= modelspec(variant, resolution) | {"modelspec.title": output_name} | description.keys()
    return keys | {PROVENANCE_KEY: json.dumps(provenance.model_dump(), sort_keys=True, ensure_ascii=False)}


def modelspec(variant: MMDiTVariant, resolution: tuple[int, int] | None) -> dict[str, str]:
    """Returns the keys of an adapter that follow from its model."""
    keys = model_keys(variant)
    keys["modelspec.architecture"] += "/lora"
    if resolution is not None:
        keys["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    return keys


def model_keys(variant: MMDiTVariant) -> dict[str, str]:
    """Returns the keys of a model: SD3 predicts a flow, not noise."""
    keys = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": PUBLIC_MODELS[variant].architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.prediction_type": "flow",
    }
    date = source_date()
    return keys | ({"modelspec.date": date} if date else {})


def described_variant(metadata: Mapping[str, str]) -> MMDiTVariant | None:
    """Returns the model that a file says it is made for, None where it does not say."""
    said = metadata.get("modelspec.architecture", "").partition("/")[0]
    return next((variant for variant, model in PUBLIC_MODELS.items() if model.architecture == said), None)


def read_provenance(metadata: Mapping[str, str], path: Path) -> Provenance:
    """Returns the provenance in a file's metadata. Raises InputError where there is none that is understood."""
    if PROVENANCE_KEY not in metadata:
        raise InputError(f"{path}: does not say how it was made: it was not trained by sd3pipe, or without metadata")
    return parse_json(metadata[PROVENANCE_KEY], TypeAdapter(Provenance), f"{path}: its provenance")


def network_args(spec: AdapterSpec) -> dict[str, str]:
    """Returns what differs from a plain LoRA, as sd-scripts' or LyCORIS' --network_args says it."""
    found: dict[str, object] = {f"{part}_dim": rank for part, rank in spec.part_ranks.items()}
    found |= {
        "emb_dims": list(spec.embedder_ranks) or None,
        "train_block_indices": None if spec.blocks == "all" else spec.blocks,
        "split_qkv": spec.split_qkv or None,
        "rank_dropout": spec.dropout.rank or None,
        "module_dropout": spec.dropout.module or None,
        "rs_lora": spec.rs_lora or None,
        "tlora_min_rank": spec.tlora_min_rank if "tlora_min_rank" in KINDS[spec.algorithm].options else None,
        "factor": None if spec.lokr_factor == AdapterSpec().lokr_factor else spec.lokr_factor,
        "rank_rules": [f"{pattern}={rank}" for pattern, rank in spec.rank_rules] or None,
        "lr_rules": [f"{pattern}={rate:g}" for pattern, rate in spec.learning_rate_rules] or None,
    }
    given = {name: _text(value) for name, value in found.items() if value is not None}
    return {**given, **KINDS[spec.algorithm].network_args}


def source_date() -> str | None:
    """Returns the date that SOURCE_DATE_EPOCH gives, else None, so that equal runs make equal files."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    if not epoch.isdecimal():
        raise ParameterError(f"SOURCE_DATE_EPOCH is {epoch!r}: it must be seconds since 1970")
    return datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def thumbnail_url(path: Path) -> str:
    """Returns a PNG, JPEG or WebP file as a data URL. Raises InputError for other files, and for large ones."""
    data = read_data(path)
    kind = next((kind for start, kind in _PICTURE_TYPES.items() if data.startswith(start)), None)
    if kind is None:
        raise InputError(f"{path}: a thumbnail is a PNG, JPEG or WebP picture")
    if len(data) > _LARGEST_THUMBNAIL:
        raise InputError(f"{path}: {len(data):,} bytes; a thumbnail is small, 512 x 512 pixels and at most 1 MiB")
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _text(value: object) -> str:
    """Returns a value as sd-scripts writes it: Python's own notation, lists and tables as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
