"""Captions as they are changed here: in the file that each came from, whole or not at all, with a way back.

Before a file is replaced, what it says by then is compared with what the editor had before it. What was changed goes
into a journal, from which the last change can be undone, also after the studio was started again.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from sd3pipe.config import Project
from sd3pipe.console import count, listed
from sd3pipe.data.folders import normalised
from sd3pipe.data.metadata import caption_field, caption_of, with_words, words_in
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json, read_text
from sd3pipe.errors import InputError, StaleError
from sd3pipe.files import storage_errors, write_json, write_text
from sd3pipe.fingerprint import hash_json
from sd3pipe.studio.gallery import Entry, caption_mark
from sd3pipe.studio.places import studio_folder

_MOST_KEPT = 100
_writing = threading.Lock()

Edit = tuple[Entry, str, str]  # a picture, the mark of its caption when it was looked at, the new text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lines:
    """Lines as they were, where `count` lines from line `at` on stand in the changed file."""

    at: int
    count: int
    before: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changed:
    """One file that was changed: the hashes of its contents, None where there was none, and what differs.

    `file` is a path from the project's folder on, or a whole one where the file lies elsewhere.
    """

    file: str
    before: str | None
    after: str
    lines: tuple[_Lines, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    format: Literal[2]
    what: str
    files: tuple[_Changed, ...]


_CHANGE = TypeAdapter(_Change)


def save_captions(project: Project, edits: Sequence[Edit], what: str) -> int:
    """Writes captions, and returns how many files changed.

    Raises StaleError, having written nothing, if any is another in its file by now; InputError, StorageError.
    """
    with _writing:
        by_file: dict[Path, list[Edit]] = defaultdict(list)
        for edit in edits:
            by_file[edit[0].item.picture.caption_file].append(edit)
        before = {file: _text(file) for file in by_file}
        edited = {file: _edited(file, before[file], those) for file, those in by_file.items()}
        stale = [name for _, names in edited.values() for name in names]
        if stale:
            raise StaleError(f"{listed(stale)}: changed elsewhere since this page was loaded: nothing is overwritten")
        after = {file: text for file, (text, _) in edited.items() if text != before[file]}
        if after:
            for old in _journal(project)[: -_MOST_KEPT + 1]:
                old.unlink(missing_ok=True)
            files = tuple(_changed(project, file, before[file], text) for file, text in after.items())
            change = _CHANGE.dump_python(_Change(format=2, what=what, files=files), mode="json")
            write_json(studio_folder(project) / "undo" / f"{time.time_ns():020d}.json", change)  # before it is made
            for file, text in after.items():
                write_text(file, text)
        return len(after)


def undo(project: Project) -> str:
    """Takes the last change back and says what it was. Raises StaleError where a file changed since, InputError."""
    with _writing:
        last = _last(project)
        if last is None:
            raise InputError("there is nothing to undo")
        entry, change = last
        files = {project.folder / file.file: file for file in change.files}
        now = {path: _text(path) for path in files}
        is_as = {path: _hash(text) for path, text in now.items()}
        other = [path.name for path, file in files.items() if is_as[path] not in (file.before, file.after)]
        if other:
            raise StaleError(
                f"{listed(other)}: changed elsewhere since: undo would overwrite that, so nothing is undone"
            )
        for path, file in files.items():
            if is_as[path] == file.before:  # the change, or an undo, was cut short
                continue
            if file.before is None:
                with storage_errors(path):
                    path.unlink(missing_ok=True)
            else:
                write_text(path, _taken_back(now[path] or "", file.lines))
        entry.unlink()
        return f"undone: {change.what}, {count(len(change.files), 'file')}"


def last_change(project: Project) -> str:
    """Returns what `undo` would take back, "" where there is nothing."""
    last = _last(project)
    return last[1].what if last else ""


def _last(project: Project) -> tuple[Path, _Change] | None:
    """Returns the last change with its file, past those that cannot be read."""
    for file in reversed(_journal(project)):
        try:
            return file, read_json(file, _CHANGE, most_bytes=MOST_LIST_BYTES)
        except DocumentError:
            continue
    return None


def _text(file: Path) -> str | None:
    try:
        return read_text(file, most_bytes=MOST_LIST_BYTES)
    except DocumentError as error:
        if error.missing:
            return None
        raise


def _hash(text: str | None) -> str | None:
    return None if text is None else hash_json(text)


def _edited(file: Path, content: str | None, edits: Sequence[Edit]) -> tuple[str, list[str]]:
    """Returns a file's content with other captions, and the pictures whose captions are not what was looked at.

    Raises InputError.
    """
    if edits[0][0].item.picture.subset.metadata_file is None:
        mark = caption_mark(normalised(content or ""))
        return f"{normalised(edits[-1][2])}\n", [entry.name for entry, was, _ in edits if was != mark]
    words = words_in(content, file) if content is not None else {}
    stale: list[str] = []
    changed: dict[str, dict[str, Any]] = {}
    for entry, was, text in edits:
        picture = entry.item.picture
        there = words.get(picture.name)
        if there is None or caption_mark(caption_of(there, picture.subset) or "") != was:
            stale.append(entry.name)
        else:
            changed[picture.name] = _with_caption(there, text, f"{file}: {picture.name}")
    return "" if stale else with_words(content or "", file, changed), stale


def _with_caption(words: Mapping[str, Any], caption: str, where: str) -> dict[str, Any]:
    """Returns the words of a record of a metadata file with another caption. Raises InputError."""
    said = [field for field in words if words[field]]
    if len(said) > 1:
        raise InputError(f"{where} has its caption in {count(len(said), 'field')}: edit it by hand")
    field = said[0] if said else caption_field(words)
    text = normalised(caption)
    return {**words, field: [text] if isinstance(words.get(field), list) else text}


def _changed(project: Project, file: Path, before: str | None, after: str) -> _Changed:
    here, folder = file.absolute(), project.folder.absolute()  # links are not resolved: they are followed with care
    place = here.relative_to(folder) if here.is_relative_to(folder) else here
    return _Changed(file=str(place), before=_hash(before), after=hash_json(after), lines=_replaced(before or "", after))


def _replaced(before: str, after: str) -> tuple[_Lines, ...]:
    """Returns what `_taken_back` needs to make the text before of that after."""
    old, new = before.split("\n"), after.split("\n")
    if len(old) == len(new):
        differing = (number for number in range(len(old)) if old[number] != new[number])
        return tuple(_Lines(at=number, count=1, before=(old[number],)) for number in differing)
    head = _num_equal(old, new)
    tail = _num_equal(old[head:][::-1], new[head:][::-1])
    return (_Lines(at=head, count=len(new) - head - tail, before=tuple(old[head : len(old) - tail])),)


def _num_equal(lines: Sequence[str], others: Sequence[str]) -> int:
    """Returns how many lines are the same before the first that differs."""
    pairs = enumerate(zip(lines, others, strict=False))
    return next((number for number, (line, other) in pairs if line != other), min(len(lines), len(others)))


def _taken_back(after: str, replaced: Sequence[_Lines]) -> str:
    lines = after.split("\n")
    for item in reversed(replaced):
        lines[item.at : item.at + item.count] = item.before
    return "\n".join(lines)


def _journal(project: Project) -> list[Path]:
    folder = studio_folder(project) / "undo"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []
