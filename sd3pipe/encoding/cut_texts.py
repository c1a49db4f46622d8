"""Which texts are longer than an encoder reads, remembered by row key for runs that encode nothing."""

from collections.abc import Collection
from pathlib import Path

from pydantic import TypeAdapter

from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.files import write_json
from sd3pipe.words import EncoderName

_FILE = "cut.json"

Cuts = dict[str, dict[EncoderName, int]]  # row key -> encoder that cuts the text -> tokens that the text has


def recall_cuts(folder: Path, keys: Collection[str]) -> Cuts:
    """Returns what a machine folder remembers of rows that are still wanted; nothing where it is damaged."""
    try:
        content = read_json(folder / _FILE, TypeAdapter(Cuts), most_bytes=MOST_LIST_BYTES)
    except DocumentError:
        return {}
    return {key: tokens for key, tokens in content.items() if key in keys}


def remember_cuts(folder: Path, cuts: Cuts) -> None:
    """Writes what `recall_cuts` reads. Raises StorageError."""
    if cuts or (folder / _FILE).exists():
        write_json(folder / _FILE, cuts)
