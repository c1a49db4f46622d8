"""Pictures as preview draws them, with their cuts and masks: made once, kept by content."""

import contextlib
import threading
from pathlib import Path

from sd3pipe.config import Project
from sd3pipe.documents import DocumentError, read_data
from sd3pipe.errors import StorageError
from sd3pipe.files import write_bytes
from sd3pipe.previewing.dataset_cards import drawn_card
from sd3pipe.previewing.sheet import card_jpeg
from sd3pipe.studio.gallery import Entry
from sd3pipe.studio.places import studio_folder

_decoding = threading.Semaphore(2)  # pictures in memory at a time


def thumbnail(project: Project, entry: Entry, *, may_write: bool) -> bytes:
    """Returns the JPEG of a picture, from the disk if it was drawn before."""
    file = thumbnail_file(project, entry.content)
    with contextlib.suppress(DocumentError):
        return read_data(file)
    with _decoding:
        data = card_jpeg(drawn_card(entry.item))
    if may_write:
        with contextlib.suppress(StorageError):  # drawn anew then
            write_bytes(file, data)
    return data


def thumbnail_file(project: Project, content: str) -> Path:
    """Returns where the thumbnail of a content lies."""
    return studio_folder(project) / "thumbnails" / content[:2] / f"{content}.jpg"
