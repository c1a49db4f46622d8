"""Lists the pictures and captions of a tar, as WebDataset has them: 0001.jpg with 0001.txt or 0001.json beside it.

A member's bytes lie in a row in the file, so that they are read from there later, in any order.
"""

import tarfile
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from sd3pipe import stopping
from sd3pipe.data.findings import Finding, finding_of
from sd3pipe.data.folders import (
    Contents,
    ReadDepth,
    Sample,
    caption_keys,
    caption_name,
    clean_name,
    is_picture_name,
    normalised,
    text_of,
)
from sd3pipe.data.places import MAX_FILE_BYTES, Span, open_container, too_large
from sd3pipe.documents import MOST_BYTES, parse_json
from sd3pipe.errors import InputError
from sd3pipe.remote import Remote

_RECORD = TypeAdapter(dict[str, Any])
_JSON = ".json"


def read_tar(file: Path | Remote, endings: tuple[str, ...], *, look: ReadDepth) -> Contents:
    """Returns the pictures of a tar, those of equal names once: the last, as tar itself has it.

    Captions end in one of `endings`, else in .json; of mere names they are empty. Raises InputError for a file that is
    no whole tar.
    """
    pictures: dict[str, Sample] = {}
    texts: dict[str, bytes] = {}
    others: list[str] = []
    with open_container(file) as handle:
        for member in _members(handle, file):
            name = clean_name(member.name)
            span = Span(member.offset_data, member.size)
            if is_picture_name(name.rpartition("/")[2]) and member.isreg() and not member.issparse():
                known: Finding = {}
                if look == "all" and span.size > MAX_FILE_BYTES:
                    known = {"unreadable": too_large(MAX_FILE_BYTES)}
                elif look == "all":
                    known = finding_of(_part(handle, span, f"{file}: {name}", MAX_FILE_BYTES), Path(name).suffix)
                pictures[name] = Sample(name=name, part=span, known=dict(known))
            elif member.isreg() and name.endswith((*endings, _JSON)):
                texts[name] = _part(handle, span, f"{file}: {name}", MOST_BYTES) if look != "names" else b""
            elif not member.isdir():
                others.append(name)
    problems: list[str] = []
    keys: set[str] = set()
    beside = {name: _caption_beside(name, endings, texts) for name in sorted(pictures)}
    samples = []
    for name, found in beside.items():
        caption = None
        try:
            if found is not None and look != "names":
                where = f"{file}: {found}"
                caption = text_of(texts[found], where) if found.endswith(endings) else _said(texts[found], where, keys)
        except InputError as error:
            problems.append(str(error))
        samples.append(replace(pictures[name], caption="" if found is not None and look == "names" else caption))
    stems = {_stem(name) for name in pictures}
    others += {name for name in texts if _stem(name) not in stems}.difference(beside.values())
    return Contents(samples=samples, keys=sorted(keys), others=sorted(others), problems=problems)


def _members(handle: BinaryIO, file: Path | Remote) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar as it stores them. Raises InputError."""
    last = "its start"
    try:
        with tarfile.open(fileobj=handle, mode="r:") as tar:
            while member := tar.next():
                stopping.check()
                yield member
                last = f"member {clean_name(member.name)}"
            handle.seek(tar.offset)
            if any(handle.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("what follows is no member")
    except tarfile.TarError as error:
        packed = " (a compressed tar has no places to read from: unpack the compression)" if last == "its start" else ""
        raise InputError(f"{file}: is no whole tar: after {last}: {error}{packed}: copy or write it again") from error


def _part(handle: BinaryIO, span: Span, where: str, most_bytes: int) -> bytes:
    """Returns the bytes of a member. Raises InputError where the file ends before them, or they are too many."""
    if span.size > most_bytes:
        raise InputError(f"{where}: {too_large(most_bytes)}")
    handle.seek(span.start)
    data = handle.read(span.size)
    if len(data) < span.size:
        raise InputError(f"{where}: the tar ends within this member: copy or write it again")
    return data


def _caption_beside(picture: str, endings: tuple[str, ...], texts: Container[str]) -> str | None:
    """Returns the name of the text, or of the record of JSON, that lies beside a picture."""
    folder, slash, base = picture.rpartition("/")
    found = caption_name(base, (*endings, _JSON), lambda name: f"{folder}{slash}{name}" in texts)
    return None if found is None else f"{folder}{slash}{found}"


def _said(data: bytes, where: str, keys: set[str]) -> str | None:
    """Returns the caption in a record; of one that has none, adds what it has to `keys`. Raises InputError."""
    record = parse_json(data, _RECORD, where)
    said = next((record[key] for key in caption_keys(record) if isinstance(record[key], str)), None)
    if said is None:
        keys.update(f"{key} ({type(value).__name__})" for key, value in record.items() if value is not None)
    return None if said is None else normalised(said)


def _stem(name: str) -> str:
    return name[: name.rindex(".")]
