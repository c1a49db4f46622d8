"""Lists the pictures of an image_dir: a folder of pictures, or of tars and tables, one of these, or the same in S3."""

import contextlib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sd3pipe import stopping
from sd3pipe.console import one_line
from sd3pipe.data.dataset_file import CONTAINER_ENDINGS, Subset
from sd3pipe.data.findings import Finding, finding_of, remembered
from sd3pipe.data.folders import (
    CaptionError,
    Contents,
    FolderRead,
    FoundFile,
    ReadDepth,
    caption_name,
    is_container_name,
    is_picture_name,
    read_folder,
    text_of,
)
from sd3pipe.data.places import Place, open_container
from sd3pipe.documents import LFS_POINTER, LFS_REMEDY
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import nearest_path
from sd3pipe.remote import Listed, Remote, listing, read_several, stamp_of_file

_WILD = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 100_000  # that braces may stand for
_CONTENTS = TypeAdapter(Contents)


def read_image_dir(subset: Subset, captions: FileStamps | None, pictures: FileStamps | None = None) -> FolderRead:
    """Returns what lies in a subset's image_dir. Raises CaptionError, and InputError or NetworkError for a bucket.

    `captions` and `pictures` are as in `read_past_problems`.
    """
    read = read_past_problems(subset, captions, pictures)
    if read.problems:
        raise CaptionError("\n".join(read.problems))
    return read


def read_past_problems(subset: Subset, captions: FileStamps | None, pictures: FileStamps | None = None) -> FolderRead:
    """Returns what lies in a subset's image_dir, caption files that cannot be used among its problems.

    Raises CaptionError for what else cannot be read, and InputError or NetworkError for a bucket.
    `captions` remembers captions, and has those read that it does not know; without it none is read. `pictures` does
    the same for pictures that share a file, or lie in a bucket; without it nothing is known of these. Without any of
    the two they are counted: a caption that is there is an empty one.
    """
    where = subset.image_dir
    assert where is not None, "a subset without metadata_file has an image_dir"
    if isinstance(where, Remote):
        return _read_remote(where, subset, captions, pictures)
    if listed_folder(where) is None:
        return _read_containers([(where, "")], subset, captions, pictures)
    if listed_folder(where) != where:
        try:
            there = [path.name for path in where.parent.iterdir() if is_container_name(path.name)]
        except OSError as error:
            raise CaptionError(f"{where.parent}: the folder cannot be read ({error.strerror})") from error
        shards = [(where.parent / name, f"{name}/") for name in _chosen(where.name, there, str(where.parent))]
        return _read_containers(shards, subset, captions, pictures)
    if where.is_file():
        read_here = ", ".join(CONTAINER_ENDINGS)
        raise CaptionError(f"{one_line(str(where))}: is no folder, and no file of pictures that is read ({read_here})")
    if is_container_name(where.name) and not where.exists():
        raise CaptionError(f"{one_line(str(where))}: there is no such file{nearest_path(where)}")
    read = read_folder(where, subset, captions)
    inside = [] if read.entries else _containers(read.others)
    if not inside:
        return read
    held = _read_containers([(where / name, f"{name}/") for name in inside], subset, captions, pictures)
    others = [name for name in read.others if name not in {*inside}] + held.others
    return replace(held, others=others, folders=read.folders)


def listed_folder(image_dir: Path) -> Path | None:
    """Returns the folder that is listed for an image_dir: of a pattern its parent's, None for a single file."""
    if image_dir.is_dir():
        return image_dir
    if image_dir.is_file() and is_container_name(image_dir.name):
        return None
    return image_dir.parent if is_container_name(image_dir.name) and _WILD.search(image_dir.name) else image_dir


def expanded(pattern: str) -> Iterator[str]:
    """Yields the patterns that one with braces stands for: {00..12} and {a,b} as in a shell."""
    braces = next((found for found in _BRACES.finditer(pattern) if re.search(r",|\d\.\.\d", found[1])), None)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    if ends := _RANGE.fullmatch(braces[1]):
        first, last = int(ends[1]), int(ends[2])
        width = len(ends[1]) if ends[1].startswith("0") else 0
        inside: Iterable[str] = (f"{number:0{width}d}" for number in range(first, min(last, first + _MOST_NAMES) + 1))
    else:
        inside = braces[1].split(",")
    for part in inside:
        yield from expanded(before + part + after)


def _containers(names: Iterable[str]) -> list[str]:
    return [name for name in names if is_container_name(name.rpartition("/")[2])]


def _chosen(pattern: str, there: list[str], where: str) -> list[str]:
    """Returns the names in a folder that a pattern means. Raises CaptionError where a part of it means none."""
    chosen: set[str] = set()
    names = {*there}
    for one in expanded(pattern):
        found = {one} & names if not _WILD.search(one) else {name for name in there if fnmatch.fnmatchcase(name, one)}
        if not found:
            raise CaptionError(f"{one_line(where)}: there is no {one_line(one)}{nearest_path(Path(where) / one)}")
        chosen |= found
    return sorted(chosen)


def _read_containers(
    files: Iterable[tuple[Path | Remote, str]],
    subset: Subset,
    captions: FileStamps | None,
    pictures: FileStamps | None,
) -> FolderRead:
    """Returns the pictures in files that hold several, with what their names begin with. Raises CaptionError."""
    entries: list[FoundFile] = []
    others: list[str] = []
    keys: dict[str, list[str]] = {}
    problems: list[str] = []
    wordless = pictures is not None and captions is None
    look: ReadDepth = "all" if pictures else "texts" if captions else "names"
    for file, prefix in files:
        try:
            contents = _contents(file, subset.caption_extensions, pictures or captions, look)
        except InputError as error:
            problems.append(one_line(str(error)))
            continue
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror or error})")
            continue
        problems += [] if wordless else contents.problems
        others += [prefix + name for name in contents.others]
        for key in [] if wordless else contents.keys:
            keys.setdefault(key, []).append(file.name)
        entries += [
            FoundFile(
                place=Place(file, sample.name, sample.part),
                name=prefix + sample.name,
                caption=None if wordless else sample.caption,
                caption_path=None if wordless or sample.caption is None else file,
                known=sample.known,
            )
            for sample in contents.samples
        ]
    if problems:
        raise CaptionError("\n".join(problems[:20]))
    return FolderRead(
        entries=sorted(entries, key=lambda entry: entry.name), others=sorted(others), folders=[], keys=keys
    )


def _contents(file: Path | Remote, endings: tuple[str, ...], stamps: FileStamps | None, look: ReadDepth) -> Contents:
    """Returns what a file holds, as remembered where possible. Raises InputError, OSError."""
    if stamps is None:
        return _read(file, endings, look=look)
    for kind in ("all", look):
        with contextlib.suppress(ValidationError):
            known = _CONTENTS.validate_python(stamps.recall(file, " ".join((kind, *endings))))
            if all("hash" not in sample.known or remembered(sample.known) for sample in known.samples):
                return known
    contents = _read(file, endings, look=look)
    stamps.remember(file, " ".join((look, *endings)), _CONTENTS.dump_python(contents, mode="json"))
    return contents


def _read(file: Path | Remote, endings: tuple[str, ...], *, look: ReadDepth) -> Contents:
    from sd3pipe.data.tables import read_table  # what a second scan does not need
    from sd3pipe.data.tars import read_tar

    is_tar = file.suffix.lower() == ".tar"
    try:
        return read_tar(file, endings, look=look) if is_tar else read_table(file, look=look)
    except InputError as error:
        with open_container(file) as handle:
            if handle.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{file}: {LFS_REMEDY}") from error
        raise


def _read_remote(where: Remote, subset: Subset, captions: FileStamps | None, pictures: FileStamps | None) -> FolderRead:
    """Returns what lies behind an address. Raises CaptionError, InputError, NetworkError."""
    is_file = is_container_name(where.name)
    wild = is_file and _WILD.search(where.name) is not None
    if is_file and not wild:
        files = [Listed(file=where, name=where.name, stamp=stamp_of_file(where))]
        inside = {where.name: ""}
    else:
        top = Remote(where.url.rpartition("/")[0]) if wild else where
        files = listing(top, recursive=subset.recursive and not wild)
        names = _containers(file.name for file in files)
        chosen = _chosen(where.name, names, str(top)) if wild else names
        inside = {name: f"{name}/" for name in chosen}
    if (stamps := pictures or captions) is not None:
        for file in files:
            stamps.note_listed(str(file.file), file.stamp)
    alone = [file for file in files if is_picture_name(file.name.rpartition("/")[2])]
    if alone and not wild:
        return _remote_pictures(alone, files, subset, captions, pictures)
    held = [(file.file, inside[file.name]) for file in files if file.name in inside]
    return _read_containers(held, subset, captions, pictures)


def _remote_pictures(
    pictures: list[Listed],
    files: list[Listed],
    subset: Subset,
    captions: FileStamps | None,
    stamps: FileStamps | None,
) -> FolderRead:
    """Returns pictures that are objects of their own, with the captions beside them."""
    by_name = {file.name: file for file in files}
    known = _looked_into(pictures, stamps) if stamps else {}
    beside: dict[str, Listed] = {}
    for picture in pictures if captions else ():
        folder, slash, base = picture.name.rpartition("/")
        found = caption_name(
            base, subset.caption_extensions, lambda name, above=folder + slash: f"{above}{name}" in by_name
        )
        if found is not None:
            beside[picture.name] = by_name[f"{folder}{slash}{found}"]
    texts = _texts(list({file.name: file for file in beside.values()}.values()), captions) if captions else {}
    entries = [
        FoundFile(
            place=Place(picture.file),
            name=picture.name,
            caption=texts[beside[picture.name].name] if picture.name in beside else None,
            caption_path=beside[picture.name].file if picture.name in beside else None,
            known=known.get(picture.name),
        )
        for picture in pictures
    ]
    used = {file.name for file in (*pictures, *beside.values())}
    others = sorted(name for name in by_name if name not in used)
    return FolderRead(entries=sorted(entries, key=lambda entry: entry.name), others=others, folders=[])


def _looked_into(pictures: list[Listed], stamps: FileStamps) -> dict[str, Finding]:
    """Returns what there is to know of pictures, fetching those that are not remembered."""
    known = {picture.name: remembered(stamps.recall(picture.file, "picture")) for picture in pictures}
    unknown = [picture for picture in pictures if known[picture.name] is None]
    for picture, data in zip(unknown, read_several([picture.file for picture in unknown]), strict=True):
        stopping.check()
        if isinstance(data, OSError):
            known[picture.name] = {"unreadable": f"it cannot be read ({data})"}
            continue
        finding = known[picture.name] = finding_of(data, picture.file.suffix)
        stamps.remember(picture.file, "picture", finding)
    return {name: finding for name, finding in known.items() if finding is not None}


def _texts(files: list[Listed], stamps: FileStamps) -> dict[str, str]:
    """Returns captions by their files' names, fetching those that are not remembered. Raises CaptionError."""
    known = {file.name: stamps.recall(file.file, "caption") for file in files}
    texts = {name: text for name, text in known.items() if isinstance(text, str)}
    unknown = [file for file in files if file.name not in texts]
    problems: list[str] = []
    for file, data in zip(unknown, read_several([file.file for file in unknown]), strict=True):
        try:
            if isinstance(data, OSError):
                raise InputError(f"{file.file}: cannot be read ({data})")
            texts[file.name] = text_of(data, str(file.file))
        except InputError as error:
            problems.append(str(error))
            continue
        stamps.remember(file.file, "caption", texts[file.name])
    if problems:
        raise CaptionError("\n".join(problems[:20]))
    return texts
