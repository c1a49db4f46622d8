"""What is drawn side by side: columns of adapters, rows of seeds, and which pictures of them are there already.

A picture's file name carries a hash of everything that it is made from, so pictures that exist are never drawn again
and never taken for others. sheet.json in the folder remembers the layout, so that latents can be decoded on another
machine. Free of torch.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from sd3pipe.adapters.find import checkpoint_adapters, find_adapter
from sd3pipe.documents import DocumentError, checked, read_json
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.files import write_json
from sd3pipe.fingerprint import hash_file

SHEET_FILE = "sheet.json"
FORMAT = 1
_ID_DIGITS = 16
_MOST_WORDS = 80  # characters of a label in a file name, which has 255 bytes on most file systems

# A file name of our own making: a cache or sheet may come from another machine, and no path in it is trusted
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._ -]*$", max_length=200)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One way to draw: the base alone, or with an adapter file at some strength."""

    label: str
    step: int | None = None  # of a run's checkpoint
    adapter: Path | None = None
    adapter_hash: str = ""
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCells:
    """A prompt's picture names, [row][column], without folder and ending."""

    name: PlainName
    title: str
    rows: tuple[str, ...]
    cells: tuple[tuple[PlainName, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The layout of all grids of a folder."""

    columns: tuple[str, ...]
    prompts: tuple[PromptCells, ...]

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if [len(line) for line in prompt.cells] != [len(self.columns)] * len(prompt.rows):
                raise ValueError(f"prompt {prompt.name} has other cells than rows and columns")

    def save(self, out: Path) -> None:
        """Writes the layout into the folder of the pictures."""
        write_json(out / SHEET_FILE, {"format": FORMAT, **asdict(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where pictures and latents of the cells lie; a picture's name says which VAE decoded it."""

    out: Path
    vae_mark: str = ""

    def picture(self, name: str) -> Path:
        return self.out / "pictures" / f"{name}-vae{self.vae_mark}.png"

    def latents(self, name: str) -> Path:
        return self.out / "latents" / f"{name}.safetensors"

    def is_done(self, name: str) -> bool:
        return self.latents(name).is_file() or (bool(self.vae_mark) and self.picture(name).is_file())


def read_sheet(out: Path) -> Sheet:
    """Returns the layout that an earlier run left in a folder. Raises InputError."""
    file = out / SHEET_FILE
    try:
        content = read_json(file, _OBJECT)
        if content.get("format") != FORMAT:
            raise InputError(f"{file}: format {content.get('format')} is not {FORMAT}: draw again with this version")
        return checked(content, _SHEET, str(file))
    except DocumentError as error:
        if error.missing:
            raise InputError(f"{out}: no {SHEET_FILE}: draw the latents with `sd3pipe sample` first") from None
        raise InputError(f"{error}: draw again") from error


def choose_columns(adapter: Path | None, checkpoints: str | None, multipliers: Sequence[float]) -> list[Column]:
    """Returns the base, then each adapter at each strength. Raises InputError, ParameterError."""
    columns = [Column(label="base")]
    if adapter is None:
        return columns
    for (label, step), file in _adapters(adapter, checkpoints).items():
        digest = hash_file(file)
        for multiplier in multipliers:
            strength = f" x {multiplier:g}" if len(multipliers) > 1 or multiplier != 1 else ""
            columns.append(
                Column(label=label + strength, step=step, adapter=file, adapter_hash=digest, multiplier=multiplier)
            )
    return columns


def cell_name(prompt: str, column: Column, seed: int, key: str) -> str:
    """Returns a picture's file name without ending: readable words, then the start of its key."""
    words = re.sub(r"[^a-z0-9.]+", "-", column.label.lower()).strip("-")[:_MOST_WORDS]
    return f"{prompt}-{words}-seed{seed}-{key[:_ID_DIGITS]}"


def _adapters(adapter: Path, checkpoints: str | None) -> dict[tuple[str, int | None], Path]:
    """Returns label and, of a checkpoint, step -> adapter file."""
    if checkpoints is None:
        return {(adapter.name if adapter.is_dir() else adapter.stem, None): find_adapter(adapter)}
    found = checkpoint_adapters(adapter)
    if not found:
        raise InputError(f"--checkpoints {checkpoints}: {adapter} has no checkpoints: name a run folder as --adapter")
    if checkpoints == "all":
        steps = list(found)
    elif checkpoints.startswith("every:"):
        every = int(checkpoints.removeprefix("every:"))
        steps = list(found)[every - 1 :: every]
    else:
        steps = [int(step) for step in checkpoints.split(",")]
    missing = [step for step in steps if step not in found]
    if missing or not steps:
        raise ParameterError(
            f"--checkpoints {checkpoints}: {adapter} has the steps {', '.join(map(str, found))}"
            + (f", not {', '.join(map(str, missing))}" if missing else "")
        )
    return {(f"step {step}", step): found[step] for step in steps}


_OBJECT, _SHEET = TypeAdapter(dict[str, Any]), TypeAdapter(Sheet)
