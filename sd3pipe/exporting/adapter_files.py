"""What an exported adapter file says of itself, and what is said of it in the report and on the summary line."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sd3pipe.adapters.files import AdapterFile, SavedAdapter
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kinds import KINDS
from sd3pipe.adapters.metadata import MULTIPLIER_KEY, PROVENANCE_KEY, model_keys, modelspec, thumbnail_url
from sd3pipe.adapters.peft_config import PEFT_CONFIG_KEY
from sd3pipe.console import count, readable_bytes
from sd3pipe.errors import ParameterError
from sd3pipe.exporting.published import published
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import ComponentSource
from sd3pipe.params.export import DescriptionParams, ExportParams
from sd3pipe.tensors.header import read_header_and_metadata
from sd3pipe.words import MMDiTVariant

_OF_THE_SOURCE_FILE = {"format", PEFT_CONFIG_KEY, "sshs_legacy_hash"}.union(
    *(kind.note_keys for kind in KINDS.values())
)


def export_metadata(
    source: Mapping[str, str],
    words: DescriptionParams,
    form: Form,
    variants: tuple[MMDiTVariant, ...],
    *,
    multiplier: float = 1.0,
) -> dict[str, str] | None:
    """Returns the metadata of an exported file: the source's, what follows from the model, the user's words.

    None for a file that says nothing. `multiplier` is the strength that the source's change is written at.
    """
    if words.metadata == "none":
        return None
    kept = {key: value for key, value in source.items() if key not in _OF_THE_SOURCE_FILE}
    known = modelspec(variants[0], None) if len(variants) == 1 else {}
    keys = known | kept | _description(words)
    if multiplier != 1.0:
        keys[MULTIPLIER_KEY] = repr(multiplier)
    if words.metadata == "public":
        keys = published(keys) | _description(words)
    if form == "diffusers" and "modelspec.implementation" in keys:
        keys["modelspec.implementation"] = "diffusers"
    return keys


def checkpoint_metadata(
    source: AdapterFile, base: ComponentSource, model: Path | None, params: ExportParams
) -> dict[str, str]:
    """Returns what a model says of the adapter in it; `model` is what the base was found in, None for a file alone."""
    if params.metadata == "none":
        return {}
    file = base.paths[0]
    place = model if model is not None and model.is_dir() else file
    titles = [_title(read_header_and_metadata(file)[1], place), _title(source.metadata, source.path)]
    keys = model_keys(mmdit_architecture(base).variant) | {
        "modelspec.title": params.out.stem,
        "modelspec.merged_from": ", ".join(titles),
        "sd3pipe_merged_multiplier": repr(params.multiplier),
    }
    if place is model:
        keys["modelspec.implementation"] = "diffusers"
    keys |= {PROVENANCE_KEY: source.metadata[PROVENANCE_KEY]} if PROVENANCE_KEY in source.metadata else {}
    return (published(keys) if params.metadata == "public" else keys) | _description(params)


def _title(metadata: Mapping[str, str], path: Path) -> str:
    return metadata.get("modelspec.title") or (path.name if path.is_dir() else path.stem)


def _description(words: DescriptionParams) -> dict[str, str]:
    """Returns the keys of the user's words. Raises InputError for a thumbnail that is none."""
    thumbnail = {"modelspec.thumbnail": thumbnail_url(words.thumbnail)} if words.thumbnail else {}
    return words.description.keys() | thumbnail


def refuse_to_replace(out: Path, sources: Iterable[Path]) -> None:
    """Raises ParameterError where a file would be written over one that it is made from."""
    if out.resolve() in {path.resolve() for path in sources}:
        raise ParameterError(f"--out {out} is what the new file is made from: choose another name")


def refuse_other_ending(out: Path) -> None:
    """Raises ParameterError for a file that programs would not take for weights."""
    if out.suffix.lower() != ".safetensors":
        stem = out.stem if out.suffix[1:].isalpha() else out.name  # v1.5 ends in no suffix
        raise ParameterError(
            f"--out {out}: programs know these files by their ending, .safetensors: name it {stem}.safetensors"
        )


def as_report(saved: SavedAdapter) -> dict[str, object]:
    """Returns what a report says of a written file, without its path."""
    return {
        "form": saved.form,
        "dtypes": list(saved.dtypes),
        "modules": saved.modules,
        "bytes": saved.nbytes,
        "largest_difference": saved.largest_difference,
        "largest_difference_at": saved.largest_at,
    }


def as_summary(saved: SavedAdapter) -> str:
    """Returns what the summary line says of a written file."""
    dtypes = " and ".join(saved.dtypes).lower()
    difference = "equal" if saved.largest_difference == 0.0 else f"within {saved.largest_difference:.1e} of it"
    return (
        f"{saved.path}, {saved.form}, {count(saved.modules, 'module')} in {dtypes}, {readable_bytes(saved.nbytes)}; "
        f"read back, every change is {difference}"
    )
