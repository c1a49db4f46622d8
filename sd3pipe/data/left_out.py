"""Says what lies in the folders of a dataset and is not used, so that nobody trains on less than they think."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sd3pipe.console import count, listed, one_line
from sd3pipe.data.dataset_file import Dataset, Subset
from sd3pipe.data.folders import CAPTION_KEYS, FolderRead, FoundFile, files_below, is_container_name, is_picture_name

REPEATS = re.compile(r"(\d+)_(.*)")  # sd-scripts' folder names below train_data_dir: 10_mycat
_MOST_REPEATS = 999
_MASKS = ("-masklabel", "-condlabel", "_mask", "-mask")  # the first two are OneTrainer's
_METADATA = re.compile(r"(?i).*\.jsonl|meta.*\.(json|csv)")
# What lies among pictures and is none: texts, other programs' caches, what systems leave behind.
_COMPANIONS = (".txt", ".caption", ".json", ".jsonl", ".csv", ".toml", ".npz", ".safetensors", ".db", ".ini", ".md")
_CAPTIONS = (".txt", ".caption", ".cap", ".tags", ".tag", ".text", ".prompt", ".md", ".json")  # by other programs


def repeats_of(folder_name: str) -> tuple[int, str] | None:
    """Returns repeats and name that stand in the name of a folder; a number like a year's is taken for none."""
    match = REPEATS.fullmatch(folder_name)
    return (int(match[1]), match[2]) if match and 0 < int(match[1]) <= _MOST_REPEATS else None


def left_out_of_folder(subset: Subset, read: FolderRead, dataset: Dataset, *, with_captions: bool) -> Iterator[str]:
    """Yields a line for each kind of thing in a subset's image_dir that is not used.

    A subset without a picture has one line, which says what lies there instead.
    """
    folder = str(subset.image_dir)
    names = [name for name in read.others if not _base(name).startswith("._")]  # macOS' shadows of other files
    unread = [*_unread_files(names, subset), *_unread_folders(Path(folder), read, dataset)]
    used = {its.metadata_file.resolve() for its in dataset.subsets if its.metadata_file is not None}
    listing = [name for name in names if _METADATA.fullmatch(_base(name)) and Path(folder, name).resolve() not in used]
    if listing:
        unread.append(f"{_names(listing, 'metadata file')}: metadata_file = NAME takes captions from one")
    if not read.entries:
        lies = "; ".join(unread) or (_names(names, "other file") if names else "there is nothing in it")
        yield f"{one_line(folder)}: subset {one_line(subset.name)} has no picture that is read: {lies}"
        return
    if with_captions:
        unread += _captions_next_door(read.entries, names)
        unread += _captions_elsewhere(read.keys)
        unread += _captions_of_nothing(read.entries, names, subset)
    yield from (f"{one_line(folder)}: not read: {what}" for what in unread)
    yield from (f"{one_line(folder)}: {remark}" for remark in _surprises(read.entries, subset))


def left_out_of_metadata(subset: Subset, entries: Sequence[FoundFile]) -> Iterator[str]:
    """Yields a line each for captions that another one replaces, and for pictures in image_dir that are not listed."""
    if subset.metadata_file is None:
        return
    again = [entry.name for entry in entries if entry.listed > 1]
    if again:
        yield (
            f"{one_line(str(subset.metadata_file))}: not read: all but the last caption of {_names(again, 'picture')}, "
            "listed more than once"
        )
    if not isinstance(subset.image_dir, Path):
        return
    known = {os.path.normpath(str(entry.place)) for entry in entries}
    try:
        there = sorted(path.name for path in subset.image_dir.iterdir() if is_picture_name(path.name))
    except OSError:  # the file may name pictures that lie elsewhere
        return
    if missing := [name for name in there if os.path.normpath(subset.image_dir / name) not in known]:
        yield (
            f"{one_line(str(subset.image_dir))}: not read: {_names(missing, 'picture')} that "
            f"{one_line(subset.metadata_file.name)} does not list"
        )


def _names(names: Sequence[str], noun: str) -> str:
    """Returns '3 pictures (a.png, b.png, c.png)'."""
    return f"{count(len(names), noun)} ({listed([one_line(name) for name in names], most=3)})"


def _unread_files(names: Iterable[str], subset: Subset) -> Iterator[str]:
    by_ending: dict[str, list[str]] = defaultdict(list)
    for name in names:
        base, ending = _base(name), _ending(name).lower()
        if base.startswith("."):
            if is_picture_name(base.lstrip(".")):
                by_ending["a hidden name"].append(name)
        elif ending not in _COMPANIONS and not name.endswith(subset.caption_extensions):
            by_ending[ending or "no ending"].append(name)
    for ending, those in by_ending.items():
        yield f"{_names(those, 'file')} with {ending}"


def _unread_folders(folder: Path, read: FolderRead, dataset: Dataset) -> Iterator[str]:
    """Yields what lies in folders below, but for those that belong to other subsets."""
    used = {
        path.resolve()
        for subset in dataset.subsets
        for path in (subset.image_dir, subset.conditioning_data_dir)
        if isinstance(path, Path)
    }
    closed = [name for name in read.folders if name.endswith("/")]
    if closed:
        yield f"{_names(closed, 'folder')} that cannot be opened"
    below = {
        name: files_below(folder / name)
        for name in read.folders
        if not name.endswith("/") and not any(path.is_relative_to((folder / name).resolve()) for path in used)
    }
    found = {name: number for name, files in below.items() if (number := sum(map(is_picture_name, files)))}
    hidden = [name for name in found if _base(name).startswith(".")]
    repeated = [name for name in found if name not in hidden and repeats_of(_base(name))]
    plain = [name for name in found if name not in hidden and name not in repeated]
    for those, way_out in (
        (plain, "recursive = true reads them"),
        (repeated, "give each a [[datasets.subsets]] of its own, with its image_dir and its number as num_repeats"),
        (hidden, "hidden folders are left alone"),
    ):
        if those:
            lie = count(sum(found[name] for name in those), "picture")
            yield f"{lie} in {_names(those, 'folder')} below it: {way_out}"
    plain = {name: files for name, files in below.items() if not _base(name).startswith(".")}
    held = {name: number for name, files in plain.items() if (number := sum(map(is_container_name, files)))}
    if held and not found and all(entry.place.part for entry in read.entries):
        lie = count(sum(held.values()), "tar or table", "tars and tables")
        yield f"{lie} in {_names([*held], 'folder')} below it: recursive = true reads them"


def _surprises(entries: Iterable[FoundFile], subset: Subset) -> Iterator[str]:
    """Yields what is read otherwise than its name says: repeats, pictures of one caption file, masks of others."""
    first = {entry.name.split("/", 1)[0] for entry in entries if "/" in entry.name}
    said = {name: repeats for name in sorted(first) if (repeats := repeats_of(name))}
    other = [name for name, (repeats, _) in said.items() if repeats != subset.num_repeats]
    if other:
        yield (
            f"num_repeats = {subset.num_repeats} counts in {_names(other, 'folder')}, whatever the name says: give "
            "each a [[datasets.subsets]] of its own for other repeats"
        )
    by_stem: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        by_stem[_stem(entry.name)].append(entry.name)
    several = [" and ".join(names) for names in by_stem.values() if len(names) > 1]
    if several:
        yield f"pictures that differ in the ending alone are all used, with one caption file: {listed(several, most=3)}"
    masks = [
        name
        for stem, names in by_stem.items()
        if stem.endswith(_MASKS) and any(stem.endswith(end) and stem.removesuffix(end) in by_stem for end in _MASKS)
        for name in names
    ]
    if masks:
        yield (
            f"{_names(masks, 'picture')} trained like any other, though called as masks of others: move masks into a "
            "folder of their own, under the names of their pictures, for conditioning_data_dir"
        )


def _captions_next_door(entries: Sequence[FoundFile], names: Collection[str]) -> Iterator[str]:
    """Yields what lies beside pictures without a caption and looks like one, by what would make it one."""
    wordless = [entry.name for entry in entries if entry.caption_path is None]
    if not wordless:
        return
    beside: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: name.lower().endswith(".json")):
        if name.lower().endswith(_CAPTIONS):
            beside[_folded(_stem(name))].append(name)
    by_remedy: dict[str, list[str]] = defaultdict(list)
    for picture in wordless:
        stem = _stem(picture)
        candidates = [*beside.get(_folded(stem), ()), *beside.get(_folded(picture), ())]
        if candidates:
            remedy = _remedy(stem, candidates[0], rename=len(wordless) < len(entries))
            by_remedy[remedy].append(candidates[0])
    for remedy, those in by_remedy.items():
        yield f"{_names(those, 'file')} beside pictures without a caption: {remedy}"


def _captions_elsewhere(keys: Mapping[str, list[str]]) -> Iterator[str]:
    """Yields what records have in place of a caption."""
    if keys:
        files = sorted({file for files in keys.values() for file in files})
        there = listed([one_line(key) for key in sorted(keys)], most=12)
        known = f"{', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}"
        yield f"{there} of {_names(files, 'file')}: a caption is a text under {known}"


def _remedy(stem: str, name: str, *, rename: bool) -> str:
    """Returns how a file becomes a caption; `rename`: another caption_extension would lose captions that are read."""
    if name.lower().endswith(".json"):
        return "captions are plain text, in a .txt of the same name"
    if not name.startswith(stem):
        return "the names differ in upper and lower case or in how accents are written: rename them"
    if rename:
        return "rename them to end as the other captions do"
    return f'caption_extension = "{name[len(stem) :]}" reads them'


def _captions_of_nothing(entries: Iterable[FoundFile], names: Iterable[str], subset: Subset) -> Iterator[str]:
    used = {str(entry.caption_path) for entry in entries}
    stems = {_folded(stem) for entry in entries for stem in (_stem(entry.name), entry.name)}
    lone = [
        name
        for name in names
        if name.endswith(subset.caption_extensions)
        and f"{subset.image_dir}/{name}" not in used
        and _folded(_stem(name)) not in stems
    ]
    if lone:
        yield f"{_names(lone, 'caption file')} without a picture"


def _folded(name: str) -> str:
    """Returns what names have in common that a person takes for the same."""
    return name if name.isascii() and name.islower() else unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return name.removesuffix(_ending(name))


def _ending(name: str) -> str:
    """Returns what Path(name).suffix does, in a tenth of the time."""
    base = _base(name)
    dot = base.rfind(".")
    return base[dot:] if dot > 0 else ""


def _base(name: str) -> str:
    return name.rpartition("/")[2]
