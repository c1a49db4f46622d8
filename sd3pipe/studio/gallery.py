"""The pictures of a project with what preview knows of each, sorted and filtered; nothing is decoded for it."""

import contextlib
import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3pipe.caption_findings import read_findings
from sd3pipe.config import Project
from sd3pipe.console import count, one_line
from sd3pipe.data.caption_cache import CachedCaptions, read_captions
from sd3pipe.data.dataset_file import Dataset, load_dataset
from sd3pipe.data.looks import Looks, Seen
from sd3pipe.data.scan import Picture, Scan, UnreadableFile, scan
from sd3pipe.errors import InputError, NetworkError, ParameterError
from sd3pipe.file_stamps import FileStamps, Stamp, stamp_of
from sd3pipe.fingerprint import hash_json
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.previewing.cards import CaptionTokens
from sd3pipe.previewing.dataset_cards import PictureItem, dataset_items
from sd3pipe.previewing.token_counts import token_counts
from sd3pipe.project.inputs import stage_options
from sd3pipe.stages import CAPTIONS, STAGES_BY_NAME
from sd3pipe.studio.places import path_of, studio_folder

log = logging.getLogger(__name__)

CAPTION_CHECK = "check-captions"
_CHECK_PATH, _CHECK_FILE = "caption_check", "caption-check.json"  # in [paths], and where it is not said there
_KEY_DIGITS = 16
_MOST_COUNTED = 50_000  # captions whose tokens are remembered
_tokens: dict[tuple[str, int], dict[str, CaptionTokens]] = {}
_tokens_lock = threading.Lock()
_looking: set[str] = set()  # folders of projects whose pictures are being looked at, which no page waits for
_looking_lock = threading.Lock()
_latest: dict[str, "Gallery"] = {}  # by project: a screen of thumbnails asks for one picture each


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture on the page. `key` names it in addresses, `content` changes with what its thumbnail shows."""

    key: str
    item: PictureItem
    findings: tuple[str, ...] = ()  # of check-captions

    @property
    def name(self) -> str:
        return one_line(self.item.picture.name)

    @property
    def subset(self) -> str:
        return self.item.picture.subset.name

    @property
    def bucket(self) -> str:
        width, height = self.item.cut.size
        return f"{width} x {height}"

    @property
    def caption(self) -> str:
        """The picture's own; class_tokens, which stand in for a missing caption, are none."""
        return self.item.picture.caption if self.item.picture.caption_path else ""

    @property
    def warnings(self) -> tuple[str, ...]:
        there = (*self.item.warnings, *self.findings)
        return there if self.caption or "no caption" in there else (*there, "no caption of its own")

    @property
    def suggested(self) -> Mapping[str, str]:
        """What captioners said, by the names of their caches; nothing where that is the caption itself."""
        said = self.item.suggested
        return {} if set(said.values()) == {self.caption} else said

    @property
    def was(self) -> str:
        """What an editor has before it: whoever saves says so, and a change from elsewhere is noticed."""
        return caption_mark(self.caption)

    @property
    def content(self) -> str:
        picture = self.item.picture
        cuts = [[*cut.resized, cut.left, cut.top, *cut.size] for cut in self.item.cuts]
        return hash_json([picture.image_hash, picture.mask_hash, cuts])[:_KEY_DIGITS]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    dataset: Dataset
    found: Scan
    entries: list[Entry]
    unreadable: list[UnreadableFile]
    warnings: tuple[str, ...]
    was_checked: bool  # by check-captions

    @property
    def buckets(self) -> list[str]:
        return sorted({entry.bucket for entry in self.entries})

    @property
    def num_named(self) -> int:
        """How many pictures check-captions named."""
        return sum(bool(entry.findings) for entry in self.entries)

    @property
    def subsets(self) -> list[str]:
        return [subset.name for subset in self.dataset.subsets]

    def entry(self, key: str) -> Entry:
        """Returns a picture by its key. Raises InputError if it is gone."""
        found = next((entry for entry in self.entries if entry.key == key), None)
        if found is None:
            raise InputError("this picture is not in the dataset any more: load the page again")
        return found

    def showing(self, key: str, content: str) -> Entry | None:
        """Returns a picture by its key if its thumbnail is that of `content`."""
        return next((entry for entry in self.entries if (entry.key, entry.content) == (key, content)), None)

    def chosen(self, query: Mapping[str, str]) -> list[Entry]:
        """Returns the pictures that a query asks for, in its order."""
        words = query.get("words", "").lower().split()
        warning = query.get("warning", "")
        found = [
            entry
            for entry in self.entries
            if query.get("bucket", "") in ("", entry.bucket)
            and query.get("subset", "") in ("", entry.subset)
            and all(word in entry.item.picture.caption.lower() or word in entry.name.lower() for word in words)
            and (not warning or any(warning == "any" or warning in text for text in entry.warnings))
        ]
        orders = {"name": lambda entry: entry.name, "caption": lambda entry: entry.caption.lower()}
        orders["bucket"] = lambda entry: (entry.item.cut.size, entry.name)
        order = orders.get(query.get("sort", ""))
        return sorted(found, key=order) if order else found


def caption_mark(caption: str) -> str:
    """Returns what stands for a caption where a page says which one it has before it."""
    return hash_json(caption)[:_KEY_DIGITS]


def read_gallery(project: Project, *, may_write: bool = True) -> Gallery:
    """Returns the pictures as the files are. Raises InputError, ParameterError."""
    dataset = load_dataset(path_of(project, "dataset"))
    stamps = FileStamps(studio_folder(project) / "stat.json")
    found = scan(dataset, stamps, past_problems=True)
    if may_write:
        stamps.save()
    text, latents = option_values(project, "encode-text"), option_values(project, "encode-latents")
    seen, missing = _seen_so_far(project, found.pictures, may_write=may_write)
    captioned = sorted(path_of(project, "caches").glob(f"*/{CAPTIONS}"))
    known = dataset_items(
        found,
        caption_variants=text["caption_variants"],
        crop_variants=latents["crop_variants"],
        seed=text["seed"],
        count_tokens=lambda captions: _counted(project, captions, text["t5xxl_max_token_length"]),
        suggested={file.parent.name: _captions(file.parent, stamp_of(file.stat())) for file in captioned},
        seen=seen,
    )
    findings = _findings(project, [item.picture for item in known.items])
    keyed = [(_key(item.picture), item) for item in known.items]
    unseen = f"{count(missing, 'picture')} not yet looked at for near-duplicates and blur: load the page again"
    _latest[str(project.folder)] = gallery = Gallery(
        dataset=dataset,
        found=found,
        entries=[Entry(key=key, item=item, findings=(findings or {}).get(key, ())) for key, item in keyed],
        unreadable=known.unreadable,
        warnings=(*known.warnings, *([unseen] if missing else [])),
        was_checked=findings is not None,
    )
    return gallery


def caption_check_file(project: Project) -> Path:
    """Returns where check-captions writes what it finds."""
    return Path(project.paths.get(_CHECK_PATH, project.folder / _CHECK_FILE))


def latest_gallery(project: Project) -> Gallery | None:
    """Returns the pictures as they were when they were last read, by a page or after a change; None where never."""
    return _latest.get(str(project.folder))


def option_values(project: Project, stage: str) -> dict[str, Any]:
    """Returns the options of a stage, and the defaults where its file or what it names cannot be used."""
    try:
        return stage_options(project, STAGES_BY_NAME[stage]).model_dump()
    except (ParameterError, InputError):
        fields = load_stage_models()[STAGES_BY_NAME[stage].module].model_fields
        return {name: field.default for name, field in fields.items()}


def _seen_so_far(project: Project, pictures: Sequence[Picture], *, may_write: bool) -> tuple[Mapping[str, Seen], int]:
    """Returns what is known of pictures, and of how many nothing is yet; `may_write` starts to look at those."""
    looks = Looks(studio_folder(project) / "looks.npz")
    missing = len(looks.missing(pictures))
    with _looking_lock:
        begins = missing > 0 and may_write and str(project.folder) not in _looking
        if begins:
            _looking.add(str(project.folder))
    if begins:
        threading.Thread(target=_look, args=(project, looks, pictures), daemon=True).start()
    return looks.seen(), missing


def _look(project: Project, looks: Looks, pictures: Sequence[Picture]) -> None:
    try:
        looks.look_at(pictures, quiet=True)
    finally:
        with _looking_lock:
            _looking.discard(str(project.folder))


@functools.lru_cache(maxsize=8)  # a page asks several times
def _captions(cache: Path, _: Stamp) -> CachedCaptions:
    try:
        return read_captions(cache)
    except InputError as error:
        log.warning("%s", error)
        return {}


def _findings(project: Project, pictures: Sequence[Picture]) -> dict[str, tuple[str, ...]] | None:
    """Returns what the caption check says by a picture's key, None where there was none.

    Captions that were edited since are not what it looked at.
    """
    file = caption_check_file(project)
    try:
        checked, written_ns = read_findings(file).pictures, file.stat().st_mtime_ns
    except (InputError, OSError):  # it has not run, or cannot be read
        return None
    said: dict[tuple[str, str], tuple[str, ...]] = {}
    for item in checked:
        words = ["the caption explains the picture no better than others' captions do"] if item.suspect else []
        words += ["the caption changes nothing"] if item.changes_nothing else []
        said[item.subset, item.name] = tuple(f"{CAPTION_CHECK}: {text}" for text in words)
    found: dict[str, tuple[str, ...]] = {}
    for picture in pictures:
        words = said.get((picture.subset.name, picture.name))
        with contextlib.suppress(OSError):  # a caption that was deleted
            if words and _caption_changed_ns(picture) <= written_ns:
                found[_key(picture)] = words
    return found


def _caption_changed_ns(picture: Picture) -> int:
    """Returns when the file with a picture's caption was changed, 0 where that is not known. Raises OSError."""
    is_beside = picture.subset.metadata_file is not None or picture.place.own_file is not None
    file = picture.caption_file if is_beside else picture.place.file
    return file.stat().st_mtime_ns if isinstance(file, Path) else 0


def _key(picture: Picture) -> str:
    return hash_json([picture.subset.name, picture.name, picture.occurrence])[:_KEY_DIGITS]


def _counted(project: Project, captions: Sequence[str], t5_tokens: int) -> Mapping[str, CaptionTokens]:
    """Returns the tokens of captions, counting only what was not counted before; none where no tokenizers are found."""
    paths = project.paths
    folder = Path(paths["tokenizers"]) if "tokenizers" in paths else None
    with _tokens_lock:
        known = _tokens.setdefault((f"{folder} {paths.get('model')}", t5_tokens), {})
        missing = [caption for caption in captions if caption not in known]
        try:
            known |= token_counts(missing, tokenizers=folder, model=paths.get("model"), t5_tokens=t5_tokens)
        except (InputError, NetworkError):
            return {}
        counted = {caption: known[caption] for caption in captions}
        if len(known) > _MOST_COUNTED:
            known.clear()
        return counted
