"""A folder that a model hub takes as it is: the adapter in diffusers' form, a model card, the run's samples."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sd3pipe.adapters.find import run_of, samples_of
from sd3pipe.data.png import text_of
from sd3pipe.documents import DocumentError, read_data, read_json
from sd3pipe.files import storage_errors, write_bytes
from sd3pipe.fingerprint import hash_bytes, hash_file, hash_json
from sd3pipe.tensors.header import read_header_and_metadata

log = logging.getLogger(__name__)

WEIGHTS = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a repository
CARD = "README.md"
PICTURES = "images"
_OURS = re.compile(r"picture-\d+\.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePictures:
    """A run's sample pictures of one step, and their prompts."""

    step: int | None = None
    files: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()


def samples_for(adapter: Path) -> SamplePictures:
    """Returns the pictures that a run drew last up to the step of one of its adapters; none for a file elsewhere."""
    run, said = run_of(adapter), read_header_and_metadata(adapter)[1].get("ss_steps", "")
    step = int(said) if said.isdecimal() else None
    drawn = samples_of(run) if run is not None else {}
    steps = [at for at in drawn if at > 0 and (step is None or at <= step)]
    if not steps:
        return SamplePictures()
    files = tuple(drawn[max(steps)])
    prompts = tuple(text_of(read_data(file), "Description") for file in files)
    return SamplePictures(step=max(steps), files=files, prompts=prompts)


def write_pictures(out: Path, files: Sequence[Path]) -> None:
    """Copies the pictures into the folder, and removes those of an earlier export. Raises StorageError."""
    wanted = {picture_name(number): file for number, file in enumerate(files)}
    for old in _pictures_in(out):
        if old.name not in wanted:
            with storage_errors(old):
                old.unlink()
    for name, file in wanted.items():
        write_bytes(out / PICTURES / name, read_data(file))


def write_card(out: Path, text: str, report: Path) -> str:
    """Writes the card, unless it was edited since `report` was written, and returns the hash of what was written last.

    Raises StorageError.
    """
    file = out / CARD
    try:
        last = str(read_json(report, TypeAdapter(dict[str, object])).get("card", ""))
    except DocumentError:
        last = ""
    if file.exists() and hash_file(file) != last:
        log.warning("%s is not what was written there last: it stays; delete it to have it made again", file)
        return last
    data = text.encode("utf-8", "replace")
    write_bytes(file, data)
    return hash_bytes(data)


def hash_output(out: Path) -> str:
    """Returns the hash of an exported file, or of all that an export writes into a folder. Raises OSError."""
    if not out.is_dir():
        return hash_file(out)
    files = [out / WEIGHTS, out / CARD, *_pictures_in(out)]
    return hash_json({file.relative_to(out).as_posix(): hash_file(file) for file in files})


def _pictures_in(out: Path) -> list[Path]:
    return sorted(file for file in (out / PICTURES).glob("*.png") if _OURS.fullmatch(file.name))


def picture_name(number: int) -> str:
    """Returns the name of a picture in its folder."""
    return f"picture-{number + 1}.png"
