"""What the readers of tars and tables tell of the pictures in a file, and what is remembered of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sd3pipe.data.parquet_cells import Cell
from sd3pipe.data.places import Span

Look = Literal["names", "texts", "all"]  # what is read of a file: nothing but names, captions, pictures, too
CAPTION_KEYS = ("caption", "prompt", "text")  # of a record, the first that is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A picture in a file that holds several: its name there, its part of the file, what was found out, its caption.

    `known` is empty where nothing was looked into, `caption` None where there is none.
    """

    name: str
    part: Span | Cell
    known: dict[str, Any] = field(default_factory=dict)
    caption: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The pictures of one file, what else lies in it by name, and captions that cannot be used, a line each."""

    samples: list[Sample]
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def clean_name(name: str) -> str:
    """Returns a name as text: bytes that are no UTF-8 are spelled out. It is a name only, and no path."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")
