"""Lists picture files with their caption files, as sd-scripts finds them in an image_dir."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sd3pipe.console import one_line
from sd3pipe.data.dataset_file import CONTAINER_ENDINGS, Subset
from sd3pipe.data.findings import Finding
from sd3pipe.data.places import ParquetCell, Place, Span
from sd3pipe.documents import LFS_POINTER, LFS_REMEDY, read_data
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import nearest_path
from sd3pipe.fingerprint import hash_bytes, is_hash
from sd3pipe.remote import Remote

PICTURE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".heif",
)  # fmt: skip
CAPTION_KEYS = ("caption", "prompt", "text")  # of a record, in capitals, too; the first that has a text
_WORK_FILES = "cache-"  # what the `datasets` library keeps beside the files of a dataset
_MOST_FOLDERS = 1000  # that files are counted in
FACE_PARTS = 4  # NAME_centrex_centrey_width_height, in pixels, as face cutting tools name pictures

ReadDepth = Literal["names", "texts", "all"]  # what is read of a file: nothing but names, captions, pictures, too


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A picture of a subset; `problem` says why it is useless to look into it."""

    place: Place
    name: str
    caption: str | None
    caption_path: Path | Remote | None = None  # the file in which the caption stands
    caption_hash: str | None = None  # of a file that holds nothing else
    known: Finding | None = None  # where the file was looked into already
    problem: str | None = None
    listed: int = 1  # how often a metadata file names it


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRead:
    """What lies in a subset's image_dir by its name below that: pictures in order, other files, folders left alone.

    `keys` are those of records without a caption, with the files that have them; `problems` are captions that cannot be
    used, a line each.
    """

    entries: list[FoundFile]
    others: list[str]
    folders: list[str]
    keys: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A picture in a file that holds several: its name there, its part of the file, what was found out, its caption.

    `known` is empty where nothing was looked into, `caption` None where there is none.
    """

    name: str
    part: Span | ParquetCell
    known: dict[str, Any] = field(default_factory=dict)
    caption: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The pictures of one file, what else lies in it by name, and captions that cannot be used, a line each.

    `keys` say what it has where captions are looked for and none is.
    """

    samples: list[Sample]
    keys: list[str]
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class CaptionError(InputError):
    """Captions or folders cannot be used: a line for each."""


def read_folder(folder: Path, subset: Subset, captions: FileStamps | None) -> FolderRead:
    """Returns what lies in a folder of pictures of a subset. Raises CaptionError for a folder that cannot be read.

    `captions` remembers caption files, and reads those that it does not know; without it none is read. A picture whose
    caption cannot be used has that as its problem.
    """
    entries: list[FoundFile] = []
    others: list[str] = []
    folders: list[str] = []
    problems: list[str] = []
    for prefix, here, files, left_alone in walked(folder, subset.recursive):
        folders += [prefix + name for name in left_alone]
        names = set(files)
        for name, problem in files.items():
            if not is_picture_name(name):
                others.append(prefix + name)
                continue
            text = digest = caption_path = None
            if captions and (found := caption_name(name, subset.caption_extensions, names.__contains__)):
                caption_path = here / found
                try:
                    text, digest = _caption(caption_path, captions)
                except InputError as error:
                    problems.append(str(error))
                    problem = problem or str(error)
            entries.append(
                FoundFile(
                    place=Place(here / name),
                    name=prefix + name,
                    caption=text,
                    caption_path=caption_path,
                    caption_hash=digest,
                    problem=problem,
                )
            )
    return FolderRead(
        entries=sorted(entries, key=lambda entry: entry.name),
        others=sorted(others),
        folders=sorted(folders),
        problems=problems,
    )


def files_below(folder: Path) -> list[str]:
    """Returns the names of files in a folder and in the first folders below it; none if it cannot be read."""
    try:
        found = list(itertools.islice(walked(folder, recursive=True), _MOST_FOLDERS))
    except CaptionError:
        return []
    return [name for _, _, files, _ in found for name in files]


def caption_keys(names: Iterable[str]) -> list[str]:
    """Returns those names of a record's fields that may hold its caption, the one that counts first in front."""
    return sorted(
        (name for name in names if name.lower() in CAPTION_KEYS), key=lambda name: CAPTION_KEYS.index(name.lower())
    )


def is_picture_name(name: str) -> bool:
    """Returns whether a file's name says that it is a picture; hidden files are none."""
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")


def is_container_name(name: str) -> bool:
    """Returns whether a file's name says that it holds several pictures."""
    return name.lower().endswith(CONTAINER_ENDINGS) and not name.startswith((".", _WORK_FILES))


def _caption(path: Path, stamps: FileStamps) -> tuple[str, str]:
    """Returns text and hash of a caption file, as remembered where possible. Raises InputError unless it is UTF-8."""
    known = stamps.recall(path, "caption")
    if isinstance(known, dict) and isinstance(known.get("text"), str) and is_hash(known.get("hash")):
        return known["text"], known["hash"]
    data = read_data(path)
    text = text_of(data, str(path))
    digest = hash_bytes(data)
    stamps.remember(path, "caption", {"text": text, "hash": digest})
    return text, digest


def text_of(data: bytes, where: str) -> str:
    """Returns the caption in the bytes that lie at `where`. Raises InputError unless they are text in UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the caption is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if data.startswith(LFS_POINTER):
        raise InputError(f"{where}: {LFS_REMEDY}")
    if "\0" in text:  # as between the letters of what is UTF-16
        raise InputError(f"{where}: the caption is not UTF-8 text (there are zero bytes in it): save it as UTF-8")
    return normalised(text)


def normalised(text: str) -> str:
    """Returns a text with Unix line ends and without blanks around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def clean_name(name: str) -> str:
    """Returns a name as text: bytes that are no UTF-8 are spelled out. It is a name only, and no path."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")


def walked(folder: Path, recursive: bool) -> Iterator[tuple[str, Path, Mapping[str, str | None], list[str]]]:
    """Yields (prefix of names, folder, {file name: why it cannot be opened or None}, folders that are left alone).

    Each real folder comes once.
    """
    waiting = [("", folder)]
    visited: set[tuple[int, int]] = set()
    while waiting:
        prefix, here = waiting.pop()
        files: dict[str, str | None] = {}
        left_alone: list[str] = []
        try:
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in visited:
                continue
            visited.add((stat.st_dev, stat.st_ino))
            with os.scandir(here) as listing:
                for entry in listing:
                    if not _is_folder(entry):
                        files[entry.name] = _file_problem(entry)
                    elif recursive and not entry.name.startswith("."):
                        waiting.append((f"{prefix}{entry.name}/", here / entry.name))
                    else:
                        left_alone.append(entry.name)
        except OSError as error:
            if not prefix:
                why = f"the folder cannot be read ({error.strerror})"
                if isinstance(error, NotADirectoryError):
                    why = "is no folder"
                elif isinstance(error, FileNotFoundError):
                    why = f"there is no such folder{nearest_path(folder)}"
                raise CaptionError(f"{one_line(str(folder))}: {why}") from error
            files, left_alone = {}, [""]
        yield prefix, here, files, left_alone


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _file_problem(entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_file():
            return None
        return "it is no regular file" if Path(entry.path).exists() else "it is a link to nowhere"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def caption_name(name: str, endings: tuple[str, ...], is_there: Callable[[str], bool]) -> str | None:
    """Returns the caption file of a picture among those that are there beside it."""
    stem = name[: name.rindex(".")]
    parts = stem.rsplit("_", FACE_PARTS)
    stems = (stem, parts[0]) if len(parts) > FACE_PARTS else (stem,)
    for candidate in stems:
        for ending in endings:
            if is_there(candidate + ending):
                return candidate + ending
    return None
