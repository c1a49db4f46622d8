"""pictures.json of a run: what the losses of training say of each picture, as it is written and read back."""

from dataclasses import asdict, dataclass
from pathlib import Path

from sd3pipe.documents import DocumentError, read_json
from sd3pipe.files import write_json
from sd3pipe.judgement import Score

PICTURES_FILE = "pictures.json"
_FORMAT = 1
_MOST_BYTES = 1_000_000_000  # 200 for each picture


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLosses:
    """One picture. `quantile` says where its losses stand among those of all pictures at equal noise: 1 is the hardest.

    `gained` is the share by which they fell from the first third of its views to the last, `learnt` whether that is
    above 0 for all pictures looked at together; None of one that was seen too seldom to tell.
    """

    name: str
    subset: str
    seen: int
    quantile: float
    gained: Score | None
    learnt: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    format: int
    pictures: tuple[PictureLosses, ...]


def write_picture_losses(run: Path, pictures: list[PictureLosses]) -> None:
    """Writes pictures.json into a run's folder. Raises StorageError."""
    write_json(run / PICTURES_FILE, {"format": _FORMAT, "pictures": [asdict(picture) for picture in pictures]})


def read_picture_losses(run: Path) -> tuple[PictureLosses, ...]:
    """Returns what pictures.json of a run says; nothing where there is none of this format. Raises DocumentError."""
    from pydantic import TypeAdapter  # takes 100 ms

    if not (run / PICTURES_FILE).is_file():
        return ()
    try:
        content = read_json(run / PICTURES_FILE, TypeAdapter(_File), most_bytes=_MOST_BYTES)
    except DocumentError as error:
        if error.missing:
            return ()
        raise
    return content.pictures if content.format == _FORMAT else ()
