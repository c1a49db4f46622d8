"""What the last run of an encode stage found, noted beside its cache with hashes of all that it went by."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue, NonNegativeInt, TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json
from sd3pipe.files import write_json
from sd3pipe.watched import Watched

_FILE = "last_run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRun:
    """`state` is that of the dataset's file and folders, `published` the manifest's hash, `recipe` stands for the rest.

    `said` is what was logged of the dataset, by level.
    """

    format: Literal[1] = 1
    dataset: str
    watched: list[Watched]
    state: str
    recipe: str
    wanted: str  # identity of what the run wanted
    published: str
    rows: NonNegativeInt
    failed: NonNegativeInt
    quarantined: NonNegativeInt
    facts: dict[str, JsonValue]  # of the report
    remark: str  # the end of the summary
    said: list[tuple[int, str]]

    def write(self, cache: Path) -> None:
        """Notes it beside a cache. Raises StorageError."""
        write_json(CacheFolder(cache).machine / _FILE, asdict(self))


def last_run(cache: Path) -> LastRun | None:
    """Returns what was noted beside a cache, None where nothing was or it is damaged."""
    try:
        return read_json(CacheFolder(cache).machine / _FILE, TypeAdapter(LastRun), most_bytes=MOST_LIST_BYTES)
    except DocumentError:
        return None
