"""caption-check.json: what `sd3pipe check-captions` found, as it is written and read back by who shows it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from sd3pipe.files import write_json
from sd3pipe.judgement import Score, read_result
from sd3pipe.picture_losses import PictureLosses

FORMAT = 1
_MOST_BYTES = 1_000_000_000  # 400 for each picture


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPicture:
    """One picture with what its caption does; scores as in judge.json, None where they cannot be said.

    `in_training` is what the run's own losses say of it.
    """

    name: str
    subset: str
    held_out: bool
    advantage: Score | None
    suspect: bool
    changes_nothing: bool
    gained: Score | None = None
    learnt: str | None = None  # "not learnt", "learnt" or "memorised"
    in_training: PictureLosses | None = None

    @property
    def full_name(self) -> str:
        return f"{self.subset}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntBy:
    """What one checkpoint gained by subset, and the gap of trained to held-out pictures at low noise."""

    checkpoint: int | str
    gained_by_subset: dict[str, Score]
    memorised_gap: Score | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionFindings:
    """The whole of caption-check.json; names are SUBSET/NAME."""

    pictures: tuple[CheckedPicture, ...]
    suspects: tuple[str, ...]
    change_nothing: tuple[str, ...]
    checkpoints: tuple[LearntBy, ...]

    def save(self, file: Path) -> None:
        """Writes the file. Raises StorageError."""
        write_json(file, {"format": FORMAT, **asdict(self)})


def read_findings(file: Path) -> CaptionFindings:
    """Returns what a file says. Raises InputError where there is none, or another format."""
    return read_result(file, CaptionFindings, "check-captions", FORMAT, most_bytes=_MOST_BYTES)
