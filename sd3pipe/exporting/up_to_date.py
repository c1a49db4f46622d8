"""Whether an exported file is what the same export would write again."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sd3pipe.console import version
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.exporting.hub_folder import hash_output
from sd3pipe.fingerprint import hash_file, hash_json
from sd3pipe.params.export import ExportParams

_ENTERS_NOTHING = {"device", "threads", "out", "adapter", "model", "mmdit", "thumbnail"}  # paths; their content enters


def made_from(params: ExportParams, adapter: Path, pictures: Iterable[Path] = ()) -> str:
    """Returns the identity of an export of one adapter file: its bytes, the options, and what else is read."""
    options = params.model_dump(mode="json", exclude=_ENTERS_NOTHING)
    thumbnail = hash_file(params.thumbnail) if params.thumbnail and params.thumbnail.is_file() else None
    bases = [_stamp(Path(path)) for path in (params.model, params.mmdit) if path is not None]
    return hash_json(
        {
            "adapter": hash_file(adapter),
            "options": options,
            "thumbnail": thumbnail,
            "bases": bases,
            "pictures": [hash_file(picture) for picture in pictures],
            "version": version(),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """What an export's report says of its file or folder: what it was made from, and its hash."""

    made_from: str
    output: str


def is_up_to_date(report: Path, out: Path, identity: str) -> bool:
    """Returns whether `report` says that `out` was made so, and `out` is still what was written then."""
    try:
        recorded = read_json(report, TypeAdapter(_Recorded))
        return recorded.made_from == identity and recorded.output == hash_output(out)
    except (OSError, DocumentError):
        return False


def _stamp(base: Path) -> list[int] | None:
    """A base is read for a few formats only, so that its size and time are enough."""
    try:
        stat = base.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
