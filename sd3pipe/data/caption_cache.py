"""Captions that a model made, in the list that `sd3pipe caption` leaves in its cache."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sd3pipe.documents import MOST_LIST_BYTES, parse_json, read_text
from sd3pipe.errors import InputError
from sd3pipe.stages import CAPTIONS


class _Line(TypedDict):
    image: str
    subset: str
    caption: str


_LINE = TypeAdapter(_Line)


CachedCaptions = Mapping[tuple[str, str], str]  # by subset and hash of the picture's bytes


def read_captions(cache: Path) -> CachedCaptions:
    """Returns the captions in a cache. Raises InputError."""
    file = cache / CAPTIONS
    if not file.is_file():
        raise InputError(f"{cache}: has no {CAPTIONS}: run `sd3pipe caption` first, or name another cache")
    lines = [
        parse_json(line, _LINE, f"{file}: line {number}")
        for number, line in enumerate(read_text(file, most_bytes=MOST_LIST_BYTES).split("\n"), start=1)
        if line
    ]
    return {(line["subset"], line["image"]): line["caption"] for line in lines}
