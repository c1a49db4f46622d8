"""What a published file may say of itself: nothing that names a place on the user's disk, and no caption.

What is not known to be harmless is left out, since a file from anybody may say anything; and of what is known, a value
in which a path stands is left out, too.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from sd3pipe.adapters.metadata import (
    KOHYA_OPTIONS,
    MULTIPLIER_KEY,
    PROVENANCE_KEY,
    described_variant,
    read_provenance,
)  # fmt: skip
from sd3pipe.errors import InputError
from sd3pipe.exporting.reproduction import LATER_STEPS_KEY, OPTION_SETS, later_steps
from sd3pipe.params.fields import option_extra
from sd3pipe.variants import PUBLIC_MODELS

_WORDS = (
    "architecture", "implementation", "prediction_type", "resolution", "sai_model_spec", "date", "title", "author",
    "description", "license", "tags", "trigger_phrase", "usage_hint", "thumbnail",
)  # fmt: skip
_NUMBERS = (
    "network_module", "network_dim", "network_alpha", "network_args", "base_model_version", "unet_lr", "optimizer",
    "steps", "epoch", "v2", "resolution", "num_train_images", "num_reg_images",
)  # fmt: skip
_FREE_TEXT = {"training_comment"}
_KEPT = {
    *(f"modelspec.{word}" for word in _WORDS),
    *(f"ss_{name}" for name in {*KOHYA_OPTIONS, *_NUMBERS} - _FREE_TEXT),
    "sd3pipe_extracted_from",  # fingerprints
    "sd3pipe_merged_multiplier",
    MULTIPLIER_KEY,
}
# A path begins at the root, at home, at a drive or at a share, or goes up; an address of the web begins otherwise
_PATH = re.compile(r"(?<![\w.:/])(?:~[\w.-]*)?/[\w.~-]|(?<![A-Za-z])[A-Za-z]:[\\/]|\\\\[\w.-]+\\|(?<![\w.])\.\.?[\\/]")
_MAY_HOLD_SLASHES = {"modelspec.thumbnail"}  # base64


def published(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns what of a file's metadata may be published.

    A title that is nothing but the run's name, which often is its folder's, gives way to the trigger phrase or to the
    name of the model.
    """
    keys = {key: value for key, value in metadata.items() if key in _KEPT}
    keys = {key: value for key, value in keys.items() if key in _MAY_HOLD_SLASHES or not names_a_place(value)}
    if "modelspec.title" in keys and keys["modelspec.title"] == metadata.get("ss_output_name"):
        keys["modelspec.title"] = keys.get("modelspec.trigger_phrase") or f"LoRA for {model_name(metadata)}"
    steps = [step for step in later_steps(metadata) if not names_a_place(step)]
    return keys | _provenance(metadata) | ({LATER_STEPS_KEY: json.dumps(steps)} if steps else {})


def names_a_place(text: str) -> bool:
    """Returns whether a path of a disk stands in a text, absolute or below a home or the current folder."""
    return _PATH.search(text) is not None


def model_name(metadata: Mapping[str, str]) -> str:
    """Returns what people call the model that a file says it is made for."""
    variant = described_variant(metadata)
    return "Stable Diffusion 3" if variant is None else PUBLIC_MODELS[variant].title


def _provenance(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the provenance without free text, and without tables, which folders give their names."""
    try:
        found = read_provenance(metadata, Path())
    except InputError:
        return {}
    parameters = {
        command: {name: value for name, value in options.items() if _is_harmless(command, name, value)}
        for command, options in found.parameters.items()
        if command in OPTION_SETS
    }
    said = found.model_copy(update={"parameters": parameters}).model_dump()
    for table in ("fingerprints", "versions"):
        said[table] = {name: value for name, value in said[table].items() if not names_a_place(f"{name} {value}")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    return {} if names_a_place(found.version) else {PROVENANCE_KEY: text}


def _is_harmless(command: str, name: str, value: JsonValue) -> bool:
    fields = OPTION_SETS[command].model_fields
    if name not in fields or name in _FREE_TEXT or option_extra(fields[name])["role"] == "path":
        return False
    return not isinstance(value, dict) and not names_a_place(json.dumps(value, ensure_ascii=False))
