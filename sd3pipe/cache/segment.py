"""A segment: one immutable safetensors file with the rows of one leaf of the plan, and what is known about each.

docs/cache-format.md describes the bytes.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from sd3pipe.cache.keys import FORMAT_VERSION, KINDS, Ingredients, Kind
from sd3pipe.cache.plan import plan_id
from sd3pipe.cache.rows import Layout, Size, layout_bytes, layout_to_json
from sd3pipe.documents import DocumentError, checked, parse_json
from sd3pipe.errors import InputError
from sd3pipe.files import open_regular, publish_once, read_at, storage_errors, sync_file
from sd3pipe.fingerprint import canonical_json, digest_bytes, hash_json
from sd3pipe.temporaries import temporary_name
from sd3pipe.tensors.header import header_bytes, header_text, placed

_METADATA_KEY = "sd3pipe"
_HEADER_UNIT = 4096  # data starts on a page, and texts of nearly equal length do not move it
_DAMAGE = (ValueError, IndexError, RecursionError, DocumentError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInfo:
    """One row of a segment without its bytes."""

    key: str
    layout: Layout
    digest: bytes
    source: str
    ingredients: Ingredients
    made_with: str


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row with its bytes, ready to be written."""

    info: RowInfo
    buffers: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """What a segment says about itself. `offsets` count from the start of the file, one more than there are rows."""

    kind: Kind
    group: str
    nbytes: int
    rows: tuple[RowInfo, ...]
    offsets: tuple[int, ...]

    @property
    def file_bytes(self) -> int:
        return self.offsets[-1]

    def placed_rows(self) -> Iterator[tuple[RowInfo, int, int]]:
        """Yields each row with its offset and size."""
        for info, start, end in zip(self.rows, self.offsets[:-1], self.offsets[1:], strict=True):
            yield info, start, end - start


_Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Number = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """The metadata of a segment's file, but for its own hash; docs/cache-format.md."""

    format: int
    kind: Kind
    group: str
    nbytes: Size
    layouts: list[Layout]
    ingredients: list[Ingredients]
    versions: list[str]
    rows: list[tuple[_Hash, _Number, _Hash, str, _Number, _Number]]


def write_segment(path: Path, *, kind: Kind, group: str, nbytes: int, rows: Sequence[StoredRow], scratch: Path) -> bool:
    """Writes a segment under a temporary name in `scratch`, then gives it its name unless another writer did.

    Returns whether this call gave it. Raises StorageError, with nothing left behind.
    """
    ordered = sorted(rows, key=lambda row: row.info.key)
    header = _header_bytes(kind, group, nbytes, [row.info for row in ordered])
    pieces = [memoryview(data).cast("B") for data in (header, *(data for row in ordered for data in row.buffers))]
    with storage_errors(path):
        temporary = temporary_name(scratch)
        try:
            with open(temporary, "xb", buffering=0) as handle:
                for data in pieces:
                    while data:
                        data = data[os.write(handle.fileno(), data) :]
                sync_file(handle)
            return publish_once(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_header(path: Path) -> SegmentHeader:
    """Returns a segment's header, checked against its own hash, the file's size and name. Raises InputError.

    A file that is gone or may not be read is none that is damaged: FileNotFoundError and PermissionError come through.
    """
    try:
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            header = _parse(header_text(handle, size))
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, *_DAMAGE) as error:
        raise InputError(f"{path}: not a whole segment of a cache ({error})") from error
    if header.file_bytes != size:
        raise InputError(f"{path}: {size} bytes where its header says {header.file_bytes}: the file was cut or changed")
    if path.name.split(".")[0] != plan_id(header.kind, [row.key for row in header.rows]):
        raise InputError(f"{path}: its name is not the hash of the keys in it")
    return header


def parse_header(start: memoryview, where: str) -> SegmentHeader:
    """Returns the header in the first bytes of a segment, checked against its own hash. Raises InputError."""
    try:
        return _parse(header_text(BytesIO(start), len(start)))
    except _DAMAGE as error:
        raise InputError(f"{where}: not a whole segment of a cache ({error})") from error


def _parse(data: bytes) -> SegmentHeader:
    """Returns the header in the JSON of a safetensors file. Raises what _DAMAGE lists."""
    tensors = parse_json(data, _OBJECT, "its header")
    metadata = tensors.pop("__metadata__", None)
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("its header is not that of a segment")
    raw = parse_json(text, _OBJECT, "its header")
    check = raw.pop("check", None)
    if raw.get("format") != FORMAT_VERSION or raw.get("kind") not in KINDS:
        raise ValueError(f"format {raw.get('format')}, kind {raw.get('kind')} is unknown")
    if hash_json([raw, tensors]) != check:
        raise ValueError("its header was changed")
    facts = checked(raw, _FACTS, "its header")
    rows = tuple(
        RowInfo(
            key=key,
            layout=facts.layouts[layout],
            digest=bytes.fromhex(digest),
            source=source,
            ingredients=facts.ingredients[ingredient],
            made_with=facts.versions[version],
        )
        for key, layout, digest, source, ingredient, version in facts.rows
    )
    offsets = [8 + len(data)]
    for row in rows:
        offsets.append(offsets[-1] + layout_bytes(row.layout))
    return SegmentHeader(kind=facts.kind, group=facts.group, nbytes=facts.nbytes, rows=rows, offsets=tuple(offsets))


def read_exactly(handle: int, count: int, offset: int, what: str = "the file") -> memoryview:
    """Returns `count` bytes at `offset` of an open file as memory that the caller owns.

    Raises EOFError if the file ends before.
    """
    data, done = np.empty(count, np.uint8).data, 0
    while done < count:
        read = read_at(handle, data[done:], offset + done)
        if not read:
            raise EOFError(f"{what} ends {count - done} bytes early")
        done += read
    return data


def read_rows(path: Path, header: SegmentHeader) -> Iterator[tuple[RowInfo, memoryview, bool]]:
    """Yields each row of a segment with its bytes and whether they have the row's digest. Raises OSError, EOFError."""
    with open(path, "rb", buffering=0) as file:
        for info, start, size in header.placed_rows():
            data = read_exactly(file.fileno(), size, start)
            yield info, data, digest_bytes(data) == info.digest


def key_is_true(kind: Kind, info: RowInfo) -> bool:
    """Whether a row's key is the one that its ingredients give."""
    return info.key == info.ingredients.key(kind, info.source)


def _header_bytes(kind: Kind, group: str, nbytes: int, infos: Sequence[RowInfo]) -> bytes:
    """Returns length and JSON of a safetensors header, padded with blanks to whole pages.

    What rows share is listed once and numbered.
    """
    layouts = _numbered(canonical_json(layout_to_json(info.layout)) for info in infos)
    ingredients = _numbered(canonical_json(info.ingredients.to_json()) for info in infos)
    versions = _numbered(canonical_json(info.made_with) for info in infos)
    rows = [
        [info.key, layout, info.digest.hex(), info.source, ingredient, version]
        for info, layout, ingredient, version in zip(infos, layouts[1], ingredients[1], versions[1], strict=True)
    ]
    facts = {
        "format": FORMAT_VERSION,
        "group": group,
        "ingredients": ingredients[0],
        "kind": kind,
        "layouts": layouts[0],
        "nbytes": nbytes,
        "rows": rows,
        "versions": versions[0],
    }
    tensors = placed((f"{info.key}.{name}", dtype, shape) for info in infos for name, dtype, shape in info.layout)
    facts["check"] = hash_json([facts, tensors])
    return header_bytes(tensors, {_METADATA_KEY: canonical_json(facts).decode()}, unit=_HEADER_UNIT)


def _numbered(texts: Iterator[bytes]) -> tuple[list[Any], list[int]]:
    """Returns the distinct JSON texts in order, parsed, and each text's number among them."""
    all_texts = list(texts)
    distinct = sorted(set(all_texts))
    numbers = {text: number for number, text in enumerate(distinct)}
    return [json.loads(text) for text in distinct], [numbers[text] for text in all_texts]


_FACTS = TypeAdapter(_Facts)
_OBJECT = TypeAdapter(dict[str, Any])
