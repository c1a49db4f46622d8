"""What an exported adapter file says of itself, and what is said of it in the report and on the summary line."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sd3pipe.adapters.files import SavedAdapter
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.kinds import KINDS
from sd3pipe.adapters.metadata import modelspec, thumbnail_url
from sd3pipe.adapters.peft_config import PEFT_CONFIG_KEY
from sd3pipe.console import count, readable_bytes
from sd3pipe.errors import ParameterError
from sd3pipe.params.export import DescriptionParams

_OF_THE_SOURCE_FILE = {"format", PEFT_CONFIG_KEY, "sshs_legacy_hash"}.union(
    *(kind.note_keys for kind in KINDS.values())
)


def export_metadata(
    source: Mapping[str, str], words: DescriptionParams, form: Form, variants: tuple[str, ...]
) -> dict[str, str] | None:
    """Returns the metadata of an exported file: the source's, what follows from the model, the user's words."""
    if not words.metadata:
        return None
    kept = {key: value for key, value in source.items() if key not in _OF_THE_SOURCE_FILE}
    known = modelspec(variants[0], None) if len(variants) == 1 else {}
    keys = known | kept | description(words)
    if form == "diffusers" and "modelspec.implementation" in keys:
        keys["modelspec.implementation"] = "diffusers"
    return keys


def description(words: DescriptionParams) -> dict[str, str]:
    """Returns the keys of the user's words. Raises InputError for a thumbnail that is none."""
    thumbnail = {"modelspec.thumbnail": thumbnail_url(words.thumbnail)} if words.thumbnail else {}
    return words.description.keys() | thumbnail


def refuse_to_replace(out: Path, sources: Iterable[Path]) -> None:
    """Raises ParameterError where a file would be written over one that it is made from."""
    if out.resolve() in {path.resolve() for path in sources}:
        raise ParameterError(f"--out {out} is what the new file is made from: choose another name")


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
