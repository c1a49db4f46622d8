"""The vocabularies of CLIP and T5, read from any of their file formats and identified by content.

CLIP: vocab.json with merges.txt, or tokenizer.json. T5: spiece.model (sentencepiece) or tokenizer.json. Two folders
with equal content in different formats have one identity, so it does not matter from where a tokenizer came.
"""

import base64
import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictInt, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.documents import read_data, read_json, read_text
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_bytes, hash_json, is_hash
from sd3pipe.words import EncoderName, VocabularyKind

VOCABULARY_KINDS: dict[EncoderName, VocabularyKind] = {"clip_l": "clip", "clip_g": "clip", "t5xxl": "t5"}
GENUINE_IDENTITIES: dict[VocabularyKind, str] = {  # of openai/clip-vit-large-patch14 and google/t5-v1_1-xxl
    "clip": "c015895def079d274e79dd66f20dfc16d220879968d1197920b4651fabd8c0ab",
    "t5": "1e06f519a901c898c2abf444384493e38b091b401c003b1fd9fb4782a9979e58",
}

CLIP_START = "<|startoftext|>"
CLIP_END = "<|endoftext|>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2

_MOST_BYTES = 100_000_000  # the largest vocabularies in use take 20 MB
_SENTINEL = "<extra_id_"  # of T5's pre-training; tokenizer.json lists the 100 of them as pieces, spiece.model does not


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipVocabulary:
    """A byte-level byte-pair vocabulary."""

    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Vocabulary:
    """A unigram vocabulary with the normaliser's table of sentencepiece; sentinels are left out."""

    pieces: tuple[tuple[str, float], ...]
    normalizer_table: bytes  # empty: text is not normalised


def has_vocabulary(folder: Path, kind: VocabularyKind) -> bool:
    """Returns whether `folder` holds a vocabulary of this kind in a known file format."""
    return bool(_files(folder, kind))


def vocabulary_identity(folder: Path, kind: VocabularyKind, stamps: FileStamps | None = None) -> str:
    """Returns the content hash of a vocabulary, remembered by the files' stats. Raises InputError."""
    files = _files(folder, kind)
    if stamps is None or not files:
        return _identity(_read(folder, kind))
    stats = [(file.name, file.stat()) for file in files]
    anchor, what = files[-1], "vocabulary"
    for name, stat in stats:
        what += f" {name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    known = stamps.recall(anchor, what)
    if is_hash(known):
        return known
    identity = _identity(_read(folder, kind))
    stamps.remember(anchor, what, identity)
    return identity


def read_clip_vocabulary(folder: Path) -> ClipVocabulary:
    """Reads vocab.json with merges.txt, or tokenizer.json. Raises InputError."""
    files = _files(folder, "clip")
    if not files:
        raise InputError(f"{folder}: no CLIP tokenizer (vocab.json with merges.txt, or tokenizer.json)")
    with _readable(folder):
        if len(files) == 2:
            ids = read_json(files[0], _IDS, most_bytes=_MOST_BYTES)
            lines = read_text(files[1], most_bytes=_MOST_BYTES).split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        else:
            model = read_json(files[0], _BYTE_PAIR, most_bytes=_MOST_BYTES)["model"]
            ids = model["vocab"]
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        vocabulary = ClipVocabulary(ids=ids, merges=tuple((left, right) for left, right in merges))
    for left, right in vocabulary.merges:
        if not {left, right, left + right} <= ids.keys():
            raise InputError(f"{folder}: the tokenizer merges {left!r} and {right!r}, which its vocabulary has not all")
    if CLIP_START not in vocabulary.ids or CLIP_END not in vocabulary.ids:
        raise InputError(f"{folder}: the tokenizer lacks {CLIP_START} or {CLIP_END}: it is not CLIP's")
    return vocabulary


def read_t5_vocabulary(folder: Path) -> T5Vocabulary:
    """Reads spiece.model or tokenizer.json. Raises InputError."""
    files = _files(folder, "t5")
    if not files:
        raise InputError(f"{folder}: no T5 tokenizer (spiece.model or tokenizer.json)")
    with _readable(folder):
        pieces, table = _read_sentencepiece(files[0]) if files[0].suffix == ".model" else _read_unigram(files[0])
        if not all(math.isfinite(score) for _, score in pieces):
            raise ValueError("a score is no number")
    if tuple(piece for piece, _ in pieces[:3]) != T5_SPECIAL:
        raise InputError(f"{folder}: the tokenizer does not begin with {' '.join(T5_SPECIAL)}: it is not T5's")
    kept = tuple((piece, score) for piece, score in pieces if not piece.startswith(_SENTINEL))
    return T5Vocabulary(pieces=kept, normalizer_table=table)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns whatever a damaged vocabulary file raises into an InputError that names its folder."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{folder}: the tokenizer's files cannot be read ({error})") from error


def _files(folder: Path, kind: VocabularyKind) -> tuple[Path, ...]:
    """Returns the files that a vocabulary would be read from, best first; none where there is no vocabulary."""
    if kind == "t5" and (folder / "spiece.model").is_file():
        return (folder / "spiece.model",)
    if kind == "clip" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return (folder / "vocab.json", folder / "merges.txt")
    return (folder / "tokenizer.json",) if (folder / "tokenizer.json").is_file() else ()


def _read(folder: Path, kind: VocabularyKind) -> ClipVocabulary | T5Vocabulary:
    return read_clip_vocabulary(folder) if kind == "clip" else read_t5_vocabulary(folder)


def _identity(vocabulary: ClipVocabulary | T5Vocabulary) -> str:
    if isinstance(vocabulary, ClipVocabulary):
        return hash_json({"kind": "clip", "ids": vocabulary.ids, "merges": vocabulary.merges})
    table = hash_bytes(vocabulary.normalizer_table)
    return hash_json({"kind": "t5", "pieces": vocabulary.pieces, "normalizer": table})


_Ids = dict[str, Annotated[StrictInt, Field(ge=0, lt=2**31)]]


class _BytePairModel(TypedDict):
    vocab: _Ids
    merges: list[str | tuple[str, str]]


class _BytePair(TypedDict):
    model: _BytePairModel


class _UnigramModel(TypedDict):
    vocab: list[tuple[str, float]]


class _NormalizerPart(TypedDict, total=False):
    precompiled_charsmap: str


class _Normalizer(_NormalizerPart, total=False):
    normalizers: list[_NormalizerPart]


class _Unigram(TypedDict):
    model: _UnigramModel
    normalizer: _Normalizer | None


_IDS, _BYTE_PAIR, _UNIGRAM = TypeAdapter(_Ids), TypeAdapter(_BytePair), TypeAdapter(_Unigram)


def _read_unigram(file: Path) -> tuple[list[tuple[str, float]], bytes]:
    content = read_json(file, _UNIGRAM, most_bytes=_MOST_BYTES)
    normalizer = content["normalizer"] or _Normalizer()
    tables = [part.get("precompiled_charsmap") for part in normalizer.get("normalizers", [normalizer])]
    return content["model"]["vocab"], base64.b64decode(next((table for table in tables if table), ""))


def _read_sentencepiece(file: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Reads sentencepiece's ModelProto: field 1 the pieces (1 text, 2 score), field 3 the normaliser (2 its table)."""
    pieces: list[tuple[str, float]] = []
    table = b""
    for field, value in _protobuf_fields(read_data(file, most_bytes=_MOST_BYTES)):
        if field == 1:
            piece = dict(_protobuf_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        elif field == 3:
            table = dict(_protobuf_fields(value)).get(2, b"")
    return pieces, table


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (field number, raw value) of one protobuf message; varints come as their own bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind, start = tag & 7, position
        if kind == 2:
            length, start = _varint(data, position)
            position = start + length
        elif kind == 0:
            position = _varint(data, position)[1]
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if position > len(data):
            raise ValueError("the file is cut short")
        yield tag >> 3, data[start:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
