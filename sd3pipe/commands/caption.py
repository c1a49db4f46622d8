"""`sd3pipe caption`: pictures to words by a model, one row per picture, and caption files where none was written."""

import functools
import importlib.util
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import Row
from sd3pipe.cache.samples import hex_list
from sd3pipe.cache.store import FillCounts
from sd3pipe.captioning.captioner import Captioner, find_captioner
from sd3pipe.captioning.plan import captions_wanted, words_of
from sd3pipe.captioning.slots import Choice, Slot, WrittenNotes, choose, slots_of, take_back, write_captions
from sd3pipe.captioning.wording import CountTokens, finished_captions, steps, told, with_further_lines, write_list
from sd3pipe.config import find_project
from sd3pipe.console import count, listed, one_line, progress, say
from sd3pipe.data.caption_cache import CachedCaptions, read_captions
from sd3pipe.data.dataset_file import Dataset, folder_dataset, load_dataset
from sd3pipe.data.looks import Looks, look_warnings
from sd3pipe.data.scan import Picture, Scan, scan, tell_about_pictures
from sd3pipe.encoding.stage import Encoding, Outlook, none_usable, run
from sd3pipe.errors import ParameterError, UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.params.caption import CaptionParams

if TYPE_CHECKING:
    from sd3pipe.captioning.caption_rows import Model

log = logging.getLogger(__name__)

_SHOWN = 5  # pictures whose words a dry run shows


def main(params: CaptionParams) -> None:
    """Captions pictures: the words become a cache, and caption files. Raises InputError, ParameterError."""
    if params.undo:
        _undo(params)
        return
    run(
        params,
        _prepare,
        stage=_Captions.stage,
        out=params.out,
        inputs={"captioner": params.captioner, "pictures": str(params.images or params.dataset or "the project's")},
        repetition=None,
    )


@dataclass(frozen=True, kw_only=True)
class _Captions(Encoding):
    """The words for a dataset's pictures, made by a captioner."""

    stage = "caption"
    parts_per_worker = 4

    params: CaptionParams
    found: Scan
    choice: Choice
    pictures: list[Picture]  # those that are captioned
    captioner: Captioner
    prompt: str
    notes: WrittenNotes
    others: list[CachedCaptions]  # whose captions are further lines

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("onnxruntime",) if self.captioner.kind == "tagger" else ("torch", "transformers")

    @property
    def kept(self) -> list[Slot]:
        """The places with a person's words, where they are kept."""
        return [] if self.params.write == "all" else self.choice.by_hand

    def facts(self) -> dict[str, Any]:
        return {"pictures": len(self.found.pictures), "kept_by_hand": len(self.kept)}

    def show(self) -> None:
        self._tell_looks()
        counter = _counter(self.params)
        for picture, row in self.trial[0]:
            if isinstance(row, UnreadablePicture):
                continue
            say(f"{picture.name}:")
            for name, text in steps(words_of(row), self.params.wording, told=told(picture), count_tokens=counter):
                say(f"  {name}: {text}")

    def ending(self, counts: FillCounts) -> tuple[dict[str, Any], str]:
        self._tell_looks()
        written = self.write() if counts.published else []
        _tell_kept(self.kept)
        return {"captioned": counts.encoded, "written": len(written)}, f", {count(len(written), 'caption')} written"

    @functools.cached_property
    def model(self) -> "Model":
        from sd3pipe.captioning.caption_rows import load_captioner  # imports Pillow, and the model's libraries

        return load_captioner(self.captioner, self.prompt, self.params)

    def encode(self, keys: Sequence[str]) -> Iterator[tuple[str, Row | UnreadablePicture]]:
        from sd3pipe.captioning.caption_rows import captioned_rows

        pictures = [self._picture_by_key[key] for key in keys]
        with progress(self.stage, len(keys), "pictures") as bar:
            for key, row in zip(keys, captioned_rows(pictures, self.model, self.params), strict=True):
                bar.advance()
                yield key, row

    def outlook(self, keys: Sequence[str]) -> Outlook:
        """Returns the device and the time by that of the first pictures: nobody knows before how much a model says."""
        rows, seconds = self.trial
        return Outlook(device=self.params.device, seconds=len(keys) * seconds / max(1, len(rows)))

    @functools.cached_property
    def trial(self) -> tuple[list[tuple[Picture, Row | UnreadablePicture]], float]:
        """What the model says of the first pictures, and how long that took without loading it."""
        from sd3pipe.captioning.caption_rows import captioned_rows

        pictures, model = self.pictures[:_SHOWN], self.model
        started = time.monotonic()
        rows = list(captioned_rows(pictures, model, self.params))
        return list(zip(pictures, rows, strict=True)), time.monotonic() - started

    def write(self) -> list[Slot]:
        """Writes the list of captions into the cache, and caption files where they belong; returns the latter."""
        reader = CacheReader(self.out)
        hashes, rows = hex_list(reader.samples.hashes("image_hash")), reader.samples.numbers("row").tolist()
        words = {digest: words_of(reader.row(row)) for digest, row in dict(zip(hashes, rows, strict=True)).items()}
        captions = finished_captions(self.pictures, words, self.params.wording, _counter(self.params))
        if self.others:
            captions = with_further_lines(captions, self.others)
        write_list(self.out, captions)
        if self.params.write == "none":
            return []
        slots = {id(slot.picture): slot for slot in self.choice.written}
        return write_captions([(slots[id(picture)], caption) for picture, caption in captions], self.notes)

    def _tell_looks(self) -> None:
        """Says which pictures are nearly the same, or blurred, before somebody trains on them."""
        looks = Looks(machine_folder(self.out) / "looks.npz")
        looks.look_at(self.found.pictures, keep=not self.params.dry_run)
        for warning in look_warnings(self.found.pictures, looks.seen()):
            log.warning("%s", warning)

    @functools.cached_property
    def _picture_by_key(self) -> Mapping[str, Picture]:
        first: dict[str, Picture] = {}
        for picture in self.pictures:
            first.setdefault(picture.image_hash, picture)
        return dict(zip(self.wanted.keys, first.values(), strict=True))


def _prepare(params: CaptionParams) -> _Captions:
    """Finds pictures, their captions and what identifies the captioner. Runs no model."""
    if params.captioner is None:
        raise ParameterError(
            "caption: --captioner is missing: name an image-text model's or a tagger's folder or hub id"
        )
    captioner = find_captioner(params.captioner, None if params.kind == "auto" else params.kind)
    if captioner.kind == "tagger" and importlib.util.find_spec("onnxruntime") is None:
        raise ParameterError('caption: a tagger needs onnxruntime: pip install "sd3pipe[tagger]"')
    _counter(params)
    others = [read_captions(cache) for cache in params.lines_of]
    stamps = FileStamps(machine_folder(params.out) / "stat.json", trust=not params.rehash)
    dataset = _dataset(params)
    found = scan(dataset, stamps, with_cached=False)
    if not found.pictures:
        raise none_usable(dataset, found.unreadable)
    tell_about_pictures(found)
    for line in found.left_out:
        log.warning("%s", line)
    notes, *others_notes = (_notes(cache) for cache in (params.out, *params.lines_of))
    slots = [] if params.write == "none" else slots_of(found.pictures)
    choice = choose(slots, [notes, *others_notes], params.write)
    if params.write == "all" and choice.by_hand and not (params.yes or params.dry_run):
        raise ParameterError(
            f"caption: --write all writes over {count(len(choice.by_hand), 'caption')} that a person wrote or changed "
            f"({_named(choice.by_hand)}): pass --yes, too (--undo brings them back)"
        )
    pictures = found.pictures if params.write == "none" else [slot.picture for slot in choice.written]
    prompt = captioner.prompt(params.prompt)
    recipe = {**params.with_role("recipe"), "prompt": prompt}
    wanted = captions_wanted(pictures, found.unreadable, captioner.fingerprint(stamps), recipe)
    if not params.dry_run:
        stamps.save()
    return _Captions(
        params=params,
        out=params.out,
        wanted=wanted,
        read=None,
        found=found,
        choice=choice,
        pictures=pictures,
        captioner=captioner,
        prompt=prompt,
        notes=notes,
        others=others,
    )


def _dataset(params: CaptionParams) -> Dataset:
    if params.images is not None:
        return folder_dataset(params.images)
    project = find_project(Path.cwd())
    file = params.dataset or (Path(project.paths["dataset"]) if project and "dataset" in project.paths else None)
    if file is None:
        raise ParameterError("caption: pass --images DIR or --dataset FILE: there is nothing to caption")
    return load_dataset(file)


def _notes(cache: Path) -> WrittenNotes:
    return WrittenNotes(machine_folder(cache) / "written.json")


def _counter(params: CaptionParams) -> CountTokens | None:
    """Returns what counts T5's tokens, where a length is asked for. Raises InputError without a tokenizer."""
    if params.wording.most_t5_tokens is None:
        return None
    from sd3pipe.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("t5xxl", find_tokenizers(folder=params.tokenizers)["t5xxl"])
    return lambda texts: [len(ids) for ids in tokenizer.encode(texts)]


def _undo(params: CaptionParams) -> None:
    """Takes back what was written into the pictures' captions."""
    found = scan(_dataset(params), FileStamps(machine_folder(params.out) / "stat.json"), with_cached=False)
    notes = _notes(params.out)
    slots = slots_of(found.pictures)
    touched = [slot for slot in slots if slot.digest is not None and notes.of(slot) is None]
    taken = take_back(slots, notes)
    say(f"caption: {count(len(taken), 'caption')} taken back")
    _tell_kept(touched)


def _tell_kept(slots: Sequence[Slot]) -> None:
    if slots:
        log.info("%s kept, which a person wrote or changed: %s", count(len(slots), "caption"), _named(slots))


def _named(slots: Sequence[Slot]) -> str:
    return listed([one_line(slot.where) for slot in slots])
