"""Captions as they are changed here: in the file that each came from, whole or not at all, with a way back.

Before a file is replaced it is compared with what the editor had before it. What was changed goes into a journal, from
which the last change can be undone, also after the studio was started again.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from sd3pipe.config import Project
from sd3pipe.console import count, listed
from sd3pipe.data.folders import normalised
from sd3pipe.data.metadata import caption_field, with_words, words_in
from sd3pipe.data.scan import Picture
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, read_json, read_text
from sd3pipe.errors import InputError, StaleError
from sd3pipe.files import storage_errors, write_json, write_text
from sd3pipe.studio.gallery import Entry
from sd3pipe.studio.places import studio_folder

_MOST_KEPT = 100
_writing = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changed:
    """One file before and after a change; None where there was, or is, none."""

    file: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    format: Literal[1]
    what: str
    files: tuple[_Changed, ...]


_CHANGE = TypeAdapter(_Change)


def save_captions(project: Project, edits: Sequence[tuple[Entry, str, str]], what: str) -> int:
    """Writes captions: (picture, what its caption was when it was looked at, new text); returns how many files changed.

    Raises StaleError, having written nothing, if any is another by now; InputError, StorageError.
    """
    with _writing:
        stale = [entry.name for entry, was, _ in edits if entry.was != was]
        if stale:
            raise StaleError(f"{listed(stale)}: changed elsewhere since this page was loaded: nothing is overwritten")
        before: dict[Path, str | None] = {}
        after: dict[Path, str] = {}
        for entry, _, text in edits:
            file = entry.item.picture.caption_file
            if file not in before:
                before[file] = _text(file)
            after[file] = _with_caption(entry.item.picture, after.get(file, before[file] or ""), text)
        files = [
            _Changed(file=str(file), before=before[file], after=after[file])
            for file in after
            if after[file] != before[file]
        ]
        if files:
            for old in _journal(project)[: -_MOST_KEPT + 1]:
                old.unlink(missing_ok=True)
            change = _CHANGE.dump_python(_Change(format=1, what=what, files=tuple(files)), mode="json")
            write_json(studio_folder(project) / "undo" / f"{time.time_ns():020d}.json", change)  # before it is made
            for changed in files:
                write_text(Path(changed.file), changed.after or "")
        return len(files)


def undo(project: Project) -> str:
    """Takes the last change back and says what it was. Raises StaleError where a file changed since, InputError."""
    with _writing:
        entries = _journal(project)
        if not entries:
            raise InputError("there is nothing to undo")
        change = read_json(entries[-1], _CHANGE)
        other = [Path(file.file).name for file in change.files if _text(Path(file.file)) != file.after]
        if other:
            raise StaleError(
                f"{listed(other)}: changed elsewhere since: undo would overwrite that, so nothing is undone"
            )
        for file in change.files:
            path = Path(file.file)
            if file.before is None:
                with storage_errors(path):
                    path.unlink(missing_ok=True)
            else:
                write_text(path, file.before)
        entries[-1].unlink()
        return f"undone: {change.what}, {count(len(change.files), 'file')}"


def last_change(project: Project) -> str:
    """Returns what `undo` would take back, "" where there is nothing."""
    entries = _journal(project)
    try:
        return read_json(entries[-1], _CHANGE).what if entries else ""
    except DocumentError:
        return ""


def _text(file: Path) -> str | None:
    try:
        return read_text(file, most_bytes=MOST_LIST_BYTES)
    except DocumentError as error:
        if error.missing:
            return None
        raise


def _with_caption(picture: Picture, content: str, caption: str) -> str:
    """Returns the content of the file with another caption for a picture. Raises InputError."""
    text = normalised(caption)
    file = picture.subset.metadata_file
    if file is None:
        return f"{text}\n"
    words = words_in(content, file).get(picture.name, {})
    said = [field for field in words if words[field]]
    if len(said) > 1:
        raise InputError(f"{file}: {picture.name} has its caption in {count(len(said), 'field')}: edit it by hand")
    field = said[0] if said else caption_field(words)
    changed = [text] if isinstance(words.get(field), list) else text
    return with_words(content, file, {picture.name: {**words, field: changed}})


def _journal(project: Project) -> list[Path]:
    folder = studio_folder(project) / "undo"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []
