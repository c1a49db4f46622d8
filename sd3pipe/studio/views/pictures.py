"""Pictures: the grid, captions edited in place, tags over a selection, undo."""

import contextlib
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from sd3pipe.cache.folder import weight_stamps
from sd3pipe.cache.store import missing_rows
from sd3pipe.console import count
from sd3pipe.documents import DocumentError, read_data
from sd3pipe.encoding.text_plan import caption_texts, encoder_files, text_recipe, text_wanted
from sd3pipe.errors import InputError, ParameterError, Sd3pipeError, StaleError, StorageError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import write_bytes
from sd3pipe.models.text_encoder_files import TextEncoders, find_text_encoders
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.previewing.dataset_cards import drawn_card
from sd3pipe.previewing.sheet import card_jpeg
from sd3pipe.project.inputs import stage_options
from sd3pipe.stages import STAGES_BY_NAME
from sd3pipe.studio.app import Ask
from sd3pipe.studio.captions import last_change, save_captions
from sd3pipe.studio.captions import undo as undo_last
from sd3pipe.studio.gallery import CAPTION_CHECK, Entry, Gallery, caption_check_file, latest_gallery, read_gallery
from sd3pipe.studio.places import studio_folder
from sd3pipe.studio.status import how_it_went
from sd3pipe.studio.tags import OPERATIONS, edited

_PAGE = 60
_SHOWN_CHANGES = 200
_decoding = threading.Semaphore(2)  # pictures in memory at a time
_hashing = threading.Lock()
_unsaved: dict[Path, FileStamps] = {}
_FILTERS = ("bucket", "subset", "words", "warning", "sort")
_WARNINGS = {
    "any": "any warning", "enlarged": "too small, enlarged", "cut off": "cut off", "same file": "duplicate",
    "nearly the same": "near-duplicate", "blurred": "blurred",
    "no caption": "no caption", "caption cut off": "caption cut off",
    CAPTION_CHECK: "named by check-captions",
}  # fmt: skip


def page(ask: Ask) -> str:
    gallery = _gallery(ask)
    chosen = gallery.chosen(ask.query)
    return ask.page(
        "pictures",
        title="Pictures",
        gallery=gallery,
        entries=chosen[:_PAGE],
        more=_more(ask, chosen, _PAGE),
        count=count,
        counts=f"{count(len(chosen), 'picture')} of {len(gallery.entries)}",
        keys=[entry.key for entry in chosen],
        query=ask.query,
        warning_kinds=_WARNINGS,
        operations=OPERATIONS,
        last_change=last_change(ask.project),
        job=ask.studio.queue.latest(ask.project.folder, "check"),
        how_it_went=how_it_went,
        named=CAPTION_CHECK,
        file_of=lambda entry: entry.item.picture.captions_lie_in,
    )


def more(ask: Ask) -> str:
    start = int(ask.query.get("from", "0")) if ask.query.get("from", "0").isdigit() else 0
    chosen = _shown_gallery(ask).chosen(ask.query)
    entries = chosen[start : start + _PAGE]
    return _cards(ask, entries, _more(ask, chosen, start + _PAGE))


def thumb(ask: Ask) -> Response:
    """Returns a picture by its content; the gallery is read only for one that was never drawn."""
    key, _, content = ask.path["key"].partition("-")
    if not (key + content).isalnum():
        raise InputError("no such picture")
    try:
        data = read_data(_thumbnail_file(ask, content))
    except DocumentError:
        shown = latest_gallery(ask.project)
        entry = (shown and shown.showing(key, content)) or _gallery(ask).entry(key)
        data = _thumbnail(ask, entry)
    return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=31536000, immutable"})


def caption(ask: Ask) -> dict[str, Any]:
    """Saves one caption, and returns its card as it is afterwards; of one that changed elsewhere, that."""
    entry = _gallery(ask).entry(ask.text("key"))
    text = str(ask.values.get("text", ""))
    try:
        save_captions(ask.project, [(entry, ask.text("was"), text)], f"the caption of {entry.name}")
    except StaleError:
        return {"html": _cards(ask, [_gallery(ask).entry(entry.key)]), "conflict": text}
    return {"html": _cards(ask, [_gallery(ask).entry(entry.key)]), "undo": last_change(ask.project)}


def tags(ask: Ask) -> dict[str, Any]:
    """Shows what an operation would change in the selected captions; makes the change if it says so."""
    operation, tag, other = ask.text("operation"), ask.text("tag"), ask.text("other")
    if operation not in OPERATIONS:
        raise ParameterError(f"operation: one of {', '.join(OPERATIONS)}")
    if not tag and operation != "dedupe":
        raise ParameterError("tag: say which one")
    gallery, wanted = _gallery(ask), set(ask.texts("keys"))
    changes = []
    for entry in gallery.entries:
        if entry.key in wanted:
            separator = entry.item.picture.subset.captions.caption_separator
            after = edited(entry.caption, operation, tag, other, separator=separator)
            if after != entry.caption:
                changes.append((entry, after))
    looked_at = ask.values.get("was")
    if ask.values.get("apply") is not True:
        shown = [(entry.name, entry.caption, after) for entry, after in changes[:_SHOWN_CHANGES]]
        words = f"{count(len(changes), 'caption')} of {len(wanted)} would change"
        html = ask.page("tag_changes", changes=shown, words=words, rest=len(changes) - len(shown))
        return {"html": html, "was": {entry.key: entry.was for entry, _ in changes}, "count": len(changes)}
    was = looked_at if isinstance(looked_at, dict) else {}
    what = f"{operation} {tag}" + (f" -> {other}" if other else "")
    saved = save_captions(ask.project, [(entry, str(was.get(entry.key)), after) for entry, after in changes], what)
    return {"saved": saved, "message": f"{what}: {count(saved, 'file')} changed"}


def undo(ask: Ask) -> dict[str, Any]:
    return {"message": undo_last(ask.project)}


def check(ask: Ask) -> dict[str, Any]:
    """Puts a caption check into the queue: it asks the base, from caches that hold the captions as they are now."""
    out = str(caption_check_file(ask.project).absolute())
    encode, asks = ["run", "encode-text", "encode-latents"], ["check-captions", "--out", out]
    return ask.queue("check", "check captions", encode, asks)


def rows(ask: Ask) -> dict[str, Any]:
    """Says how many rows encode-text would make."""
    try:
        missing, total = _rows_to_encode(ask)
    except Sd3pipeError as error:
        return {"message": f"how much is to be encoded is not known: {str(error).splitlines()[0]}", "rows": None}
    words = f"encode-text will make {count(missing, 'row')} of {total:,}" if missing else "every caption is encoded"
    return {"message": words, "rows": missing}


def _thumbnail(ask: Ask, entry: Entry) -> bytes:
    """Returns the JPEG of a picture, from the disk if it was drawn before."""
    file = _thumbnail_file(ask, entry.content)
    with contextlib.suppress(DocumentError):
        return read_data(file)
    with _decoding:
        data = card_jpeg(drawn_card(entry.item))
    if not ask.studio.access.read_only:
        with contextlib.suppress(StorageError):  # drawn anew then
            write_bytes(file, data)
    return data


def _thumbnail_file(ask: Ask, content: str) -> Path:
    return studio_folder(ask.project) / "thumbnails" / content[:2] / f"{content}.jpg"


def _rows_to_encode(ask: Ask) -> tuple[int, int]:
    """Returns how many rows encode-text would make, and of how many. Raises InputError, ParameterError.

    Weights are known by what encode-text remembered of their files; without a cache nothing is there to compare.
    """
    gallery = _shown_gallery(ask)
    if gallery.found.problems:
        raise InputError(gallery.found.problems[0])
    params = stage_options(ask.project, STAGES_BY_NAME["encode-text"])
    assert isinstance(params, EncodeTextParams) and params.out is not None
    texts = caption_texts(gallery.found, gallery.dataset, variants=params.caption_variants, seed=params.seed)
    total = len(texts.text_by_hash)
    if not (params.out / "manifest.json").is_file():
        return total, total
    encoders = find_text_encoders(params.model, encoder_files(params), params.tokenizers)
    fingerprints = _fingerprints(encoders, params.out, may_write=not ask.studio.access.read_only)
    wanted = text_wanted(texts, encoders.sizes, fingerprints, text_recipe(params))
    return len(missing_rows(params.out, wanted).keys), total


def _fingerprints(encoders: TextEncoders, cache: Path, *, may_write: bool) -> dict[str, str]:
    """Returns what identifies weights, which are read where a model was moved: once, by one thread. Raises InputError.

    What is not to be written is remembered as long as the studio runs.
    """
    with _hashing:
        stamps = weight_stamps(cache) if may_write else _unsaved.setdefault(cache, weight_stamps(cache))
        found = encoders.fingerprints(stamps)
        if may_write:
            stamps.save()
        return found


def _shown_gallery(ask: Ask) -> Gallery:
    """Returns the pictures that the page was made from: they are not looked for anew with each part of it."""
    return latest_gallery(ask.project) or _gallery(ask)


def _gallery(ask: Ask) -> Gallery:
    return read_gallery(ask.project, may_write=not ask.studio.access.read_only)


def _cards(ask: Ask, entries: list[Entry], more: str = "") -> str:
    return ask.page("cards", entries=entries, more=more, file_of=lambda entry: entry.item.picture.captions_lie_in)


def _more(ask: Ask, chosen: list[Entry], start: int) -> str:
    """Returns the address of what follows, "" where nothing does."""
    if start >= len(chosen):
        return ""
    query = {name: ask.query[name] for name in _FILTERS if ask.query.get(name)}
    return f"/p/{ask.slug}/pictures/more?{urlencode({**query, 'from': start})}"
