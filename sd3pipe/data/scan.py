"""Finds the pictures of a dataset: files, sizes, content hashes, masks and raw captions. Decodes nothing.

What a picture file's header says, a caption's text and their hashes are remembered by the files' stat, so that a second
scan reads nothing and imports no Pillow.
"""

import functools
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sd3pipe import stopping
from sd3pipe.console import count, listed
from sd3pipe.data.caption_cache import CachedCaptions, read_captions
from sd3pipe.data.dataset_file import Dataset, Subset
from sd3pipe.data.folders import PICTURE_ENDINGS, CaptionError, FoundFile, mask_files, read_folder
from sd3pipe.data.holding_out import held_out
from sd3pipe.data.left_out import left_out_of_folder, left_out_of_metadata
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.errors import InputError, UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_bytes, hash_file, is_hash
from sd3pipe.stages import CAPTIONS
from sd3pipe.watched import Watched

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of one subset. Width and height are after EXIF orientation.

    `name` is the path below the subset's folder; `occurrence` counts pictures of equal content in one subset from 0;
    `caption` is the raw text, or class_tokens, or empty.
    """

    path: Path
    name: str
    subset: Subset
    occurrence: int
    image_hash: str
    mask_path: Path | None
    mask_hash: str | None
    width: int
    height: int
    has_alpha: bool
    animated: bool
    caption: str
    caption_path: Path | None
    caption_hash: str | None
    split: Split

    @property
    def caption_file(self) -> Path:
        """The file that the caption came from, or in which a first one would be looked for."""
        listed = self.subset.metadata_file or self.caption_path
        return listed or self.path.with_suffix(self.subset.caption_extensions[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableFile:
    """An unreadable picture with the reason; its place in the join of text and latents is as for Picture."""

    path: Path
    name: str
    subset: str
    image_hash: str  # empty where the file could not be read at all
    reason: str

    def to_json(self) -> dict[str, str]:
        """Returns what a cache's manifest says of it."""
        return {"name": self.name, "subset": self.subset, "image_hash": self.image_hash, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """All pictures in a fixed order (subsets as in the file, then by name) and the unreadable ones.

    `left_out` says in lines what else lies in the folders and is not used.
    """

    pictures: list[Picture]
    unreadable: list[UnreadableFile]
    left_out: list[str]


def scan(dataset: Dataset, stamps: FileStamps, *, with_captions: bool = True, with_cached: bool = True) -> Scan:
    """Returns what a dataset consists of. Raises InputError for missing folders, bad captions and an empty dataset.

    Without `with_captions` no caption file is read, and every caption is class_tokens or empty; without `with_cached`
    no caption is taken from a caption_cache.
    Call `stamps.save()` afterwards; it is not called here.
    """
    pictures: list[Picture] = []
    unreadable: list[UnreadableFile] = []
    left_out: list[str] = []
    problems: list[str] = []
    captions = stamps if with_captions else None
    for subset in dataset.subsets:
        try:
            entries, remarks = _entries(subset, dataset, captions)
        except CaptionError as error:
            problems += error.problems
            continue
        left_out += remarks
        cached: CachedCaptions = {}
        if subset.caption_cache is not None and with_captions and with_cached:
            cached = read_captions(subset.caption_cache)
        masks = mask_files(subset.conditioning_data_dir) if subset.conditioning_data_dir else None
        seen: Counter[str] = Counter()
        for entry in entries:
            found = _examine(entry, subset, masks, seen, stamps)
            if isinstance(found, Picture):
                pictures.append(_with_cached(found, entry, cached))
            else:
                unreadable.append(found)
    if problems:
        raise InputError("\n".join(problems))
    if not pictures and not unreadable:
        why = "; ".join(left_out) or "no metadata_file lists a picture"
        raise InputError(f"{dataset.path}: the dataset is empty: {why}")
    return Scan(pictures=_split(pictures), unreadable=unreadable, left_out=left_out)


def _entries(subset: Subset, dataset: Dataset, captions: FileStamps | None) -> tuple[list[FoundFile], list[str]]:
    """Returns the files of a subset, and lines about what is not used. Raises CaptionError."""
    if subset.metadata_file is not None:
        entries = metadata_entries(subset)
        return entries, list(left_out_of_metadata(subset, entries))
    read = read_folder(subset, captions)
    return read.entries, list(left_out_of_folder(subset, read, dataset, with_captions=captions is not None))


def _split(pictures: Sequence[Picture]) -> list[Picture]:
    """Returns the pictures with those that validation holds out marked."""
    chosen = held_out((picture.subset, picture.image_hash) for picture in pictures)
    return [
        replace(picture, split="validation") if (picture.subset.name, picture.image_hash) in chosen else picture
        for picture in pictures
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """The files that a scan went by with their hashes, and the folders it listed with the endings that mattered."""

    files: dict[Path, str]
    folders: dict[Path, tuple[str, ...]]


def source_files(found: Scan, dataset: Dataset, *, captions: bool) -> SourceFiles:
    """Returns what a cache of the scanned pictures depends on, with caption files or without."""
    files: dict[Path, str] = {item.path: item.image_hash for item in found.unreadable if item.image_hash}
    for picture in found.pictures:
        files[picture.path] = picture.image_hash
        if picture.mask_path is not None and picture.mask_hash is not None:
            files[picture.mask_path] = picture.mask_hash
        if captions and picture.caption_path is not None and picture.caption_hash is not None:
            files[picture.caption_path] = picture.caption_hash
    folders: dict[Path, tuple[str, ...]] = {}
    for subset in dataset.subsets:
        if captions and subset.caption_cache is not None:
            files[subset.caption_cache / CAPTIONS] = hash_file(subset.caption_cache / CAPTIONS)
        if subset.metadata_file is not None:
            files[subset.metadata_file] = hash_file(subset.metadata_file)
        elif subset.image_dir is not None:
            endings = PICTURE_ENDINGS + (subset.caption_extensions if captions else ())
            for folder in {subset.image_dir, *_folders_of(found, subset)}:
                folders[folder] = tuple(dict.fromkeys((*folders.get(folder, ()), *endings)))
    return SourceFiles(files=files, folders=folders)


def watched_folders(dataset: Dataset, *, captions: bool) -> list[Watched] | None:
    """Returns where a scan looks, for the files that matter to it; None where a metadata file names them."""
    watched = []
    for subset in dataset.subsets:
        if subset.image_dir is None or subset.metadata_file is not None:
            return None
        endings = PICTURE_ENDINGS + (subset.caption_extensions if captions else ())
        watched.append(Watched(folder=str(subset.image_dir.absolute()), endings=endings, recursive=subset.recursive))
        if captions and (made := subset.caption_cache):
            watched.append(Watched(folder=str(made.absolute()), endings=(CAPTIONS,), recursive=False))
        if masks := subset.conditioning_data_dir:
            watched.append(Watched(folder=str(masks.absolute()), endings=PICTURE_ENDINGS, recursive=False))
    return watched


def _folders_of(found: Scan, subset: Subset) -> set[Path]:
    return {Path(folder) for folder in {os.path.split(p.path)[0] for p in found.pictures if p.subset is subset}}


def tell_about_captions(found: Scan) -> None:
    """Logs what a user may not expect of the captions: missing ones, and further lines that do not count."""
    wordless = [picture for picture in found.pictures if not picture.caption.strip()]
    _tell(wordless, "picture", "without a caption, trained with the empty one")
    cut = [p for p in found.pictures if not p.subset.captions.enable_wildcard and "\n" in p.caption]
    _tell(cut, "caption", "of several lines; without enable_wildcard only the first counts")


def tell_about_pictures(found: Scan) -> None:
    """Logs what a user may not expect of the pictures: further frames, files that are left out, those held out."""
    asked = sum(picture.subset.validation_split > 0 for picture in found.pictures)
    if asked:
        number = sum(picture.split == "validation" for picture in found.pictures)
        log.info("validation_split holds out %d of %s", number, count(asked, "picture"))
    animated = [picture for picture in found.pictures if picture.animated]
    _tell(animated, "animated picture", "of which only the first frame is used")
    for file in found.unreadable:
        log.warning("%s: left out: %s", file.path, file.reason)


def _tell(pictures: Sequence[Picture], noun: str, what: str) -> None:
    if pictures:
        log.warning("%s %s: %s", count(len(pictures), noun), what, listed([str(item.path) for item in pictures]))


def _examine(
    entry: FoundFile, subset: Subset, masks: dict[str, Path] | None, seen: Counter[str], stamps: FileStamps
) -> Picture | UnreadableFile:
    """Returns the picture behind a file, or why it cannot be used."""
    known: Mapping[str, Any] = {"unreadable": entry.problem} if entry.problem else _known(entry.path, stamps)
    mask_path = masks.get(Path(entry.name).stem) if masks is not None else None
    mask_hash, problem = None, known.get("unreadable")
    if problem is None and masks is not None:
        if mask_path is None:
            problem = f"there is no mask for it in {subset.conditioning_data_dir}"
        else:
            known_mask = _known(mask_path, stamps)
            mask_hash, problem = known_mask.get("hash"), _mask_problem(known, known_mask)
    if problem is not None:
        return UnreadableFile(
            path=entry.path, name=entry.name, subset=subset.name, image_hash=known.get("hash", ""), reason=problem
        )
    image_hash = known["hash"]
    seen[image_hash] += 1
    return Picture(
        path=entry.path,
        name=entry.name,
        subset=subset,
        occurrence=seen[image_hash] - 1,
        image_hash=image_hash,
        mask_path=mask_path,
        mask_hash=mask_hash,
        width=known["width"],
        height=known["height"],
        has_alpha=known["has_alpha"],
        animated=known["animated"],
        caption=entry.caption if entry.caption is not None else subset.class_tokens or "",
        caption_path=entry.caption_path,
        caption_hash=entry.caption_hash,
        split="train",
    )


def _with_cached(picture: Picture, entry: FoundFile, cached: CachedCaptions) -> Picture:
    """Returns a picture with the caption that a model made, where nobody wrote one."""
    text = cached.get((picture.subset.name, picture.image_hash))
    return picture if text is None or entry.caption is not None else replace(picture, caption=text)


def _mask_problem(picture: Mapping[str, Any], mask: Mapping[str, Any]) -> str | None:
    if mask.get("unreadable"):
        return f"its mask cannot be used: {mask['unreadable']}"
    if (mask["width"], mask["height"]) != (picture["width"], picture["height"]):
        return (
            f"its mask has {mask['width']} x {mask['height']} pixels, but it has "
            f"{picture['width']} x {picture['height']}"
        )
    return None


def _known(path: Path, stamps: FileStamps) -> Mapping[str, Any]:
    """Returns hash and header of a picture file, or its hash and why it is unreadable; as remembered where possible."""
    known = _remembered(stamps.recall(path, "picture"))
    if known is not None and known.get("decoder", _decoder()) == _decoder():
        return known
    known = _look_into(path)
    if known.get("hash"):
        stamps.remember(path, "picture", known)
    return known


def _remembered(known: object) -> Mapping[str, Any] | None:
    """Returns what was remembered about a picture if it is what `_look_into` returns."""
    if not isinstance(known, dict) or not is_hash(known.get("hash")):
        return None
    if isinstance(known.get("unreadable"), str):
        return known
    sides, flags = (known.get("width"), known.get("height")), (known.get("has_alpha"), known.get("animated"))
    fits = all(type(side) is int and side > 0 for side in sides) and all(type(flag) is bool for flag in flags)
    return known if fits else None


def _look_into(path: Path) -> dict[str, Any]:
    from sd3pipe.data.headers import read_header, read_picture  # import Pillow, which a second scan does not need

    stopping.check()
    try:
        data = read_picture(path)
    except UnreadablePicture as error:
        return {"unreadable": str(error)}
    try:
        header = read_header(data, path.suffix)
    except UnreadablePicture as error:
        return {"hash": hash_bytes(data), "unreadable": str(error), "decoder": _decoder()}
    return {
        "hash": hash_bytes(data),
        "width": header.width,
        "height": header.height,
        "has_alpha": header.has_alpha,
        "animated": header.animated,
    }


@functools.cache
def _decoder() -> str:
    """Returns the versions of Pillow and its plugins: others may read what these do not."""
    versions = [_version(package) for package in ("pillow", "pillow-heif", "pillow-jxl-plugin")]
    return " ".join(filter(None, versions))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
