"""Where each picture's caption stands, what sd3pipe wrote there, and whose words they are.

A caption is ours only if it is, to the byte, what was written for that picture: whatever else stands there, a person
wrote or touched. What was written is remembered beside the captions cache, by hash, with what stood there before.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from sd3pipe.data.metadata import caption_field, read_metadata, with_words, words_in
from sd3pipe.data.scan import Picture
from sd3pipe.documents import MOST_LIST_BYTES, parse_json, read_data, read_json
from sd3pipe.errors import InputError
from sd3pipe.files import write_bytes, write_json, write_text
from sd3pipe.fingerprint import hash_bytes, hash_json
from sd3pipe.words import WrittenCaptions

log = logging.getLogger(__name__)

_FORMAT = 1
_RECORD = TypeAdapter(dict[str, Any])
_Words = Mapping[str, Mapping[str, Any]]  # by picture, its fields with words


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where the caption of one picture stands, or would."""

    picture: Picture
    file: Path  # of this caption alone, or a metadata file
    entry: str | None  # the picture's name in a metadata file
    digest: str | None  # of the caption that stands there; None where none does

    @property
    def where(self) -> str:
        """The place in one line, for messages and the notes."""
        return str(self.file) if self.entry is None else f"{self.file}: {self.entry}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A caption that was written: for which picture, where, the hash of its text, and what stood there before."""

    image: str
    where: str
    text: str
    previous: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    format: Literal[1]
    captions: list[Note]


def slots_of(pictures: Sequence[Picture]) -> list[Slot]:
    """Returns the place of each picture's caption. Raises InputError.

    Pictures that share a caption file (a.png, a.jpg) share its place: the first of them has it.
    """
    words_of_file = functools.cache(_words_of_file)
    slots: dict[tuple[Path, str | None], Slot] = {}
    shared: list[str] = []
    taken: list[str] = []
    for picture in pictures:
        file, digest, entry = picture.caption_file, picture.caption_hash, None
        if digest is None and file.is_dir():
            taken.append(str(file))
            continue
        if picture.subset.metadata_file is not None:
            entry, digest = picture.name, _digest_of_words(words_of_file(file).get(picture.name, {}))
        slot = Slot(picture=picture, file=file, entry=entry, digest=digest)
        if slots.setdefault((slot.file, slot.entry), slot) is not slot:
            shared.append(str(picture.place))
    if shared:
        log.warning("left out, as another picture has their caption file: %s", ", ".join(shared[:5]))
    if taken:
        log.warning("left out, as a folder has the name of their caption file: %s", ", ".join(taken[:5]))
    return list(slots.values())


class WrittenNotes:
    """What was written, by picture."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._by_picture: dict[str, list[Note]] = {}
        if file.exists():
            for note in read_json(file, TypeAdapter(_Notes), most_bytes=MOST_LIST_BYTES).captions:
                self._by_picture.setdefault(note.image, []).append(note)

    def of(self, slot: Slot) -> Note | None:
        """Returns the note of the caption that stands in a slot; None if it is a person's, or there is none.

        A picture that was renamed with its caption is known by its content.
        """
        fitting = [note for note in self._by_picture.get(slot.picture.image_hash, ()) if note.text == slot.digest]
        return next((note for note in fitting if note.where == slot.where), fitting[-1] if fitting else None)

    def add(self, note: Note, old: Note | None) -> None:
        """Notes a caption in the place of whatever was written there before, but for the old one, which yet stands."""
        others = [other for other in self._by_picture.get(note.image, ()) if other.where != note.where or other == old]
        self._by_picture[note.image] = [*others, note]

    def drop(self, notes: Iterable[Note]) -> None:
        """Forgets captions that stand no longer."""
        gone = set(notes)
        self._by_picture = {
            image: [note for note in group if note not in gone] for image, group in self._by_picture.items()
        }

    def save(self) -> None:
        """Writes the notes. Raises StorageError.

        What is killed in between loses nothing as long as there is a note of every caption that stands: one is saved
        before its caption is written, and dropped after that was taken away.
        """
        notes = [note for group in self._by_picture.values() for note in group]
        write_json(self._file, TypeAdapter(_Notes).dump_python(_Notes(format=_FORMAT, captions=notes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which slots are written, and which hold a person's words."""

    written: list[Slot]
    by_hand: list[Slot]


def choose(slots: Iterable[Slot], notes: Sequence[WrittenNotes], write: WrittenCaptions) -> Choice:
    """Returns which captions are to be made: never over a person's words, unless `write` is "all".

    A caption is ours where any of the notes has it.
    """
    written, by_hand = [], []
    for slot in slots:
        ours = any(its.of(slot) is not None for its in notes)
        if slot.digest is not None and not ours:
            by_hand.append(slot)
        if write in ("all", "none") or slot.digest is None or (ours and write == "own"):
            written.append(slot)
    return Choice(written=written, by_hand=by_hand)


def write_captions(captions: Sequence[tuple[Slot, str]], notes: WrittenNotes) -> list[Slot]:
    """Writes a caption into each slot that needs another than it has, and returns those.

    What stands there no longer as the slot says was changed in between, and is kept. Raises StorageError.
    """
    changes: list[tuple[Slot, str | None]] = []
    replaced: list[Note] = []
    words_of_file = functools.cache(_words_of_file)
    for slot, caption in captions:
        present = _present(slot, words_of_file)
        text = f"{caption}\n" if slot.entry is None else json.dumps({caption_field(_words(present)): caption})
        if slot.digest == _digest(slot, text):
            continue
        if _digest(slot, present) != slot.digest:
            log.warning("%s: changed while captions were made, and kept", slot.where)
            continue
        old, digest = notes.of(slot), _digest(slot, text)
        assert digest is not None
        previous = old.previous if old is not None else present
        notes.add(Note(image=slot.picture.image_hash, where=slot.where, text=digest, previous=previous), old)
        replaced += [old] if old is not None else []
        changes.append((slot, text))
    notes.save()
    _apply(changes)
    notes.drop(replaced)
    notes.save()
    return [slot for slot, _ in changes]


def take_back(slots: Iterable[Slot], notes: WrittenNotes) -> list[Slot]:
    """Brings back what stood where captions were written and nobody has touched them since; returns those slots."""
    found = [(slot, note) for slot in slots if (note := notes.of(slot)) is not None]
    _apply([(slot, note.previous) for slot, note in found])
    notes.drop(note for _, note in found)
    notes.save()
    return [slot for slot, _ in found]


def _apply(changes: Sequence[tuple[Slot, str | None]]) -> None:
    """Writes what belongs into slots; None takes a caption's file away."""
    listed: dict[Path, dict[str, dict[str, Any]]] = {}
    for slot, text in changes:
        if slot.entry is not None:
            listed.setdefault(slot.file, {})[slot.entry] = _words(text)
        elif text is None:
            slot.file.unlink(missing_ok=True)
        else:
            write_bytes(slot.file, text.encode("utf-8", "surrogatepass"))
    for file, words in listed.items():
        write_text(file, with_words(read_metadata(file), file, words))


def _words_of_file(file: Path) -> _Words:
    return words_in(read_metadata(file), file)


def _present(slot: Slot, words_of_file: Callable[[Path], _Words]) -> str | None:
    """Returns what stands in a slot at this moment: a file's text, or the fields with words of a record, as JSON."""
    if slot.entry is not None:
        return json.dumps(words_of_file(slot.file).get(slot.entry, {}))
    try:
        return read_data(slot.file).decode("utf-8") if slot.file.exists() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{slot.file}: the caption is not UTF-8 text: save it as UTF-8") from error


def _words(text: str | None) -> dict[str, Any]:
    """Returns the fields with words that a record has, or had."""
    return parse_json(text or "{}", _RECORD, "a caption that was written before")


def _digest(slot: Slot, text: str | None) -> str | None:
    """Returns the hash of what stands, or would stand, in a slot; None where there is no caption."""
    if slot.entry is not None:
        return _digest_of_words(_words(text))
    return None if text is None else hash_bytes(text.encode("utf-8", "surrogatepass"))


def _digest_of_words(words: Mapping[str, Any]) -> str | None:
    said = {field: value for field, value in words.items() if value}
    return hash_json(said) if said else None
