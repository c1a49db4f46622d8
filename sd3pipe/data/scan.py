"""Finds the pictures of a dataset: files, sizes, content hashes, masks and raw captions. Decodes nothing.

What a picture file's header says, a caption's text and their hashes are remembered by the files' stat, so that a second
scan reads nothing and imports no Pillow.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sd3pipe.console import count, listed
from sd3pipe.data.caption_cache import CachedCaptions, read_captions
from sd3pipe.data.dataset_file import CONTAINER_ENDINGS, Dataset, Subset
from sd3pipe.data.findings import find_out
from sd3pipe.data.folders import PICTURE_ENDINGS, CaptionError, FoundFile
from sd3pipe.data.holding_out import held_out
from sd3pipe.data.image_dirs import listed_folder, read_past_problems
from sd3pipe.data.left_out import left_out_of_folder, left_out_of_metadata
from sd3pipe.data.masks import mask_problem, masks_of, one_mask_of_several
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.data.places import Place
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_file
from sd3pipe.remote import Remote
from sd3pipe.stages import CAPTIONS
from sd3pipe.watched import Watched

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]
NO_TEXT = "whose caption is a word that programs write where there is none; it is trained as it stands"
_MOST_LINES = 20  # about pictures that are left out
_NO_TEXTS = {"nan", "none", "null", "<na>", "undefined"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of one subset. Width and height are after EXIF orientation.

    `name` is the path below the subset's folder; `occurrence` counts pictures of equal content in one subset from 0;
    `caption` is the raw text, or class_tokens, or empty.
    """

    place: Place
    name: str
    subset: Subset
    occurrence: int
    image_hash: str
    mask_place: Place | None
    mask_hash: str | None
    width: int
    height: int
    has_alpha: bool
    animated: bool
    caption: str
    caption_path: Path | Remote | None  # the file in which the caption stands
    caption_hash: str | None  # of a file that holds nothing else
    split: Split

    @property
    def caption_file(self) -> Path:
        """The file that the caption came from, or in which a first one would be looked for.

        Raises InputError for a picture beside which none can be written.
        """
        if self.subset.metadata_file is not None:
            return self.subset.metadata_file
        if self.place.own_file is None:
            raise InputError(
                f"{self.place}: captions are written beside pictures in a folder, not into {self.captions_lie_in}: "
                "captions of `sd3pipe caption --write none` count where the subset names their caption_cache"
            )
        if isinstance(self.caption_path, Path):
            return self.caption_path
        return self.place.own_file.with_name(self.place.stem + self.subset.caption_extensions[0])

    @property
    def captions_lie_in(self) -> str:
        """The name of the file in which this picture's caption stands, or would."""
        own = self.subset.metadata_file or self.place.own_file
        return self.place.file.name if own is None else self.caption_file.name


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableFile:
    """An unreadable picture with the reason; its place in the join of text and latents is as for Picture."""

    place: Place
    name: str
    subset: str
    image_hash: str  # empty where the file could not be read at all
    reason: str

    @classmethod
    def of(cls, picture: Picture, reason: str) -> "UnreadableFile":
        """Returns what becomes of a picture that proves useless."""
        place, name, image_hash = picture.place, picture.name, picture.image_hash
        return cls(place=place, name=name, subset=picture.subset.name, image_hash=image_hash, reason=reason)

    def to_json(self) -> dict[str, str]:
        """Returns what a cache's manifest says of it."""
        return {"name": self.name, "subset": self.subset, "image_hash": self.image_hash, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """All pictures in a fixed order (subsets as in the file, then by name) and the unreadable ones.

    `left_out` says in lines what else lies in the folders and is not used, `problems` what no stage would take.
    """

    pictures: list[Picture]
    unreadable: list[UnreadableFile]
    left_out: list[str]
    problems: list[str]


def scan(
    dataset: Dataset,
    stamps: FileStamps,
    *,
    with_captions: bool = True,
    with_cached: bool = True,
    past_problems: bool = False,
) -> Scan:
    """Returns what a dataset consists of. Raises InputError for missing folders, bad captions and an empty dataset.

    Without `with_captions` no caption file is read, and every caption is class_tokens or empty; without `with_cached`
    no caption is taken from a caption_cache. `past_problems` leaves out what folders and captions are bad instead, as
    long as a picture is left.
    Call `stamps.save()` afterwards; it is not called here.
    """
    pictures: list[Picture] = []
    unreadable: list[UnreadableFile] = []
    left_out: list[str] = []
    problems: list[str] = []
    captions = stamps if with_captions else None
    for subset in dataset.subsets:
        try:
            if subset.metadata_file is not None:
                entries = metadata_entries(subset)
                left_out += left_out_of_metadata(subset, entries)
            else:
                read = read_past_problems(subset, captions, pictures=stamps)
                problems += read.problems
                if read.problems and not past_problems:
                    continue
                entries = read.entries
                left_out += left_out_of_folder(subset, read, dataset, with_captions=with_captions)
        except CaptionError as error:
            problems.append(str(error))
            continue
        cached: CachedCaptions = {}
        if subset.caption_cache is not None and with_captions and with_cached:
            cached = read_captions(subset.caption_cache)
        masks = masks_of(entries, subset.conditioning_data_dir) if subset.conditioning_data_dir else None
        seen: Counter[str] = Counter()
        found = [_examine(entry, subset, masks, cached, seen, stamps) for entry in entries]
        unreadable += [item for item in found if isinstance(item, UnreadableFile)]
        usable = [item for item in found if isinstance(item, Picture)]
        pictures += usable
        shared = one_mask_of_several((p.mask_place, p.name, p.image_hash) for p in usable if p.mask_place)
        problems += [shared] if shared else []
    if problems and not (past_problems and pictures):
        raise InputError("\n".join(problems))
    if not pictures and not unreadable:
        why = "; ".join(left_out) or "no metadata_file lists a picture"
        raise InputError(f"{dataset.path}: the dataset is empty: {why}")
    chosen = held_out((picture.subset, picture.image_hash) for picture in pictures)
    marked = [
        replace(picture, split="validation") if (picture.subset.name, picture.image_hash) in chosen else picture
        for picture in pictures
    ]
    return Scan(pictures=marked, unreadable=unreadable, left_out=left_out, problems=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """The files that a scan went by with their hashes, and the folders it listed with the endings that mattered.

    A file that holds several pictures has no hash: its stat alone counts. `trees` are those `folders` whose
    sub-folders count, too, and the folders of masks. `remote` are addresses.
    """

    files: dict[Path, str | None]
    folders: dict[Path, tuple[str, ...]]
    trees: dict[Path, tuple[str, ...]]
    remote: tuple[str, ...]


def source_files(found: Scan, dataset: Dataset, *, captions: bool) -> SourceFiles:
    """Returns what a cache of the scanned pictures depends on, with caption files or without."""
    files: dict[Path, str | None] = {}
    remote: list[str] = []
    for item in (*found.unreadable, *found.pictures):
        if isinstance(item.place.file, Path) and (item.image_hash or item.place.part):
            files[item.place.file] = None if item.place.part else item.image_hash
    for picture in found.pictures:
        if picture.mask_place is not None and picture.mask_hash is not None and picture.mask_place.own_file:
            files[picture.mask_place.own_file] = picture.mask_hash
        if captions and isinstance(picture.caption_path, Path) and picture.caption_hash is not None:
            files[picture.caption_path] = picture.caption_hash
    folders: dict[Path, tuple[str, ...]] = {}
    recursive: set[Path] = set()
    for subset in dataset.subsets:
        if captions and subset.caption_cache is not None:
            files[subset.caption_cache / CAPTIONS] = hash_file(subset.caption_cache / CAPTIONS)
        if subset.metadata_file is not None:
            files[subset.metadata_file] = hash_file(subset.metadata_file)
        elif isinstance(subset.image_dir, Path):
            if top := listed_folder(subset.image_dir):
                endings = _endings(subset, captions=captions)
                folders[top] = tuple(dict.fromkeys((*folders.get(top, ()), *endings)))
                recursive |= {top} if subset.recursive and top == subset.image_dir else set()
        elif subset.image_dir is not None:
            remote.append(str(subset.image_dir))
    masks = {subset.conditioning_data_dir for subset in dataset.subsets if subset.conditioning_data_dir}
    trees = dict.fromkeys(masks, PICTURE_ENDINGS) | {top: folders[top] for top in recursive}
    return SourceFiles(files=files, folders=folders, trees=trees, remote=tuple(remote))


def _endings(subset: Subset, *, captions: bool) -> tuple[str, ...]:
    """Returns how the files end that matter in a subset's folders."""
    return PICTURE_ENDINGS + CONTAINER_ENDINGS + (subset.caption_extensions if captions else ())


def watched_folders(dataset: Dataset, *, captions: bool) -> list[Watched] | None:
    """Returns where a scan looks, for the files that matter to it; None where a metadata file or a bucket has them."""
    watched = []
    for subset in dataset.subsets:
        if not isinstance(subset.image_dir, Path) or subset.metadata_file is not None:
            return None
        folder = listed_folder(subset.image_dir)
        endings = _endings(subset, captions=captions) if folder else (subset.image_dir.name.lower(),)
        recursive = subset.recursive and folder == subset.image_dir
        folder = (folder or subset.image_dir.parent).absolute()
        watched.append(Watched(folder=str(folder), endings=endings, recursive=recursive))
        if captions and (made := subset.caption_cache):
            watched.append(Watched(folder=str(made.absolute()), endings=(CAPTIONS,), recursive=False))
        if masks := subset.conditioning_data_dir:
            watched.append(Watched(folder=str(masks.absolute()), endings=PICTURE_ENDINGS, recursive=True))
    return watched


def tell_about_captions(found: Scan) -> None:
    """Logs what a user may not expect of the captions: missing ones, and further lines that do not count."""
    wordless = [picture for picture in found.pictures if not picture.caption.strip()]
    _tell(wordless, "picture", "without a caption, trained with the empty one")
    _tell([picture for picture in found.pictures if is_no_text(picture.caption)], "picture", NO_TEXT)
    cut = [p for p in found.pictures if not p.subset.captions.enable_wildcard and "\n" in p.caption]
    _tell(cut, "caption", "of several lines; without enable_wildcard only the first counts")


def is_no_text(caption: str) -> bool:
    """Returns whether a caption is what programs write in the place of one."""
    return caption.strip().lower() in _NO_TEXTS


def tell_about_pictures(found: Scan) -> None:
    """Logs what a user may not expect of the pictures: further frames, files that are left out, those held out."""
    asked = sum(picture.subset.validation_split > 0 for picture in found.pictures)
    if asked:
        number = sum(picture.split == "validation" for picture in found.pictures)
        log.info("validation_split holds out %d of %s", number, count(asked, "picture"))
    animated = [picture for picture in found.pictures if picture.animated]
    _tell(animated, "animated picture", "of which only the first frame is used")
    for file in found.unreadable[:_MOST_LINES]:
        log.warning("%s: left out: %s", file.place, file.reason)
    if (more := len(found.unreadable) - _MOST_LINES) > 0:
        log.warning("and %s left out", count(more, "more picture"))


def _tell(pictures: Sequence[Picture], noun: str, what: str) -> None:
    if pictures:
        log.warning("%s %s: %s", count(len(pictures), noun), what, listed([str(item.place) for item in pictures]))


def _examine(
    entry: FoundFile,
    subset: Subset,
    masks: Mapping[str, Place] | None,
    cached: CachedCaptions,
    seen: Counter[str],
    stamps: FileStamps,
) -> Picture | UnreadableFile:
    """Returns the picture behind a file, or why it cannot be used. Where nobody wrote a caption, a model's counts."""
    known: Mapping[str, Any] = (
        {"unreadable": entry.problem} if entry.problem else entry.known or find_out(entry.place, stamps)
    )
    mask_place = masks.get(entry.name) if masks is not None else None
    mask_hash, problem = None, known.get("unreadable")
    if problem is None and masks is not None:
        if mask_place is None:
            problem = f"there is no mask for it in {subset.conditioning_data_dir}"
        else:
            known_mask = find_out(mask_place, stamps)
            mask_hash, problem = known_mask.get("hash"), mask_problem(known, known_mask)
    if problem is not None:
        return UnreadableFile(
            place=entry.place, name=entry.name, subset=subset.name, image_hash=known.get("hash", ""), reason=problem
        )
    image_hash, caption = known["hash"], entry.caption
    if caption is None:
        caption = cached.get((subset.name, image_hash), subset.class_tokens or "")
    seen[image_hash] += 1
    return Picture(
        place=entry.place,
        name=entry.name,
        subset=subset,
        occurrence=seen[image_hash] - 1,
        image_hash=image_hash,
        mask_place=mask_place,
        mask_hash=mask_hash,
        width=known["width"],
        height=known["height"],
        has_alpha=known["has_alpha"],
        animated=known["animated"],
        caption=caption,
        caption_path=entry.caption_path,
        caption_hash=entry.caption_hash,
        split="train",
    )
