"""Whether an adapter file's bytes are those that were written, by the best witness that there is.

The file's own digest covers every byte of it. Older files of train have one in their checkpoint's state.json, or only
sd-scripts' hash of the tensors, which other programs carry along when they change a file.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from sd3pipe.adapters.find import ADAPTER_NAME, STATE_NAME
from sd3pipe.adapters.metadata import PROVENANCE_KEY
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import hash_chunks, hash_file
from sd3pipe.tensors.header import header_text
from sd3pipe.tensors.writer import file_pieces

log = logging.getLogger(__name__)

DIGEST_KEY = "sd3pipe_digest"
TENSOR_HASH_KEY = "sshs_model_hash"

_BLANK = "0" * 64  # what stands in the digest's own place while it is computed
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Witness:
    """A digest that is recorded somewhere, and how it comes from the file."""

    where: str
    recorded: str
    of_file: Callable[[Path], str]
    ours: bool  # written by sd3pipe for these very bytes; another program may leave a stale one behind


class _StoredFile(BaseModel):
    blake3: str


class _State(BaseModel):
    files: dict[str, _StoredFile]


def with_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata with the digest of the file that write_tensors makes of these tensors and of it."""
    blank = {**metadata, DIGEST_KEY: _BLANK}
    return {**metadata, DIGEST_KEY: hash_chunks(file_pieces(tensors, blank))}


def check_bytes(path: Path, metadata: Mapping[str, str]) -> None:
    """Compares a file that can be parsed with what is recorded of its bytes; nothing recorded is nothing to compare.

    Raises InputError where sd3pipe wrote it otherwise; a hash of another program that does not match is a warning.
    """
    witness = _witness(path, metadata)
    if witness is None or witness.of_file(path) == witness.recorded:
        return
    if witness.ours:
        raise InputError(
            f"{path}: is damaged: its bytes are not those that sd3pipe wrote ({witness.where}): copy it again, make it "
            "again from its run, or take another checkpoint; after a change on purpose, save it without that metadata"
        )
    log.warning(
        "%s: its tensors do not match the hash in its metadata (%s): it is damaged, or a program changed it and left "
        "the old hash",
        path,
        witness.where,
    )


def _witness(path: Path, metadata: Mapping[str, str]) -> _Witness | None:
    if DIGEST_KEY in metadata:
        recorded = metadata[DIGEST_KEY]
        return _Witness(DIGEST_KEY, recorded, partial(_digest_without, recorded), ours=True)
    in_state = _digest_in_state(path)
    if in_state is not None:
        return _Witness(f"{STATE_NAME} beside it", in_state, hash_file, ours=True)
    if TENSOR_HASH_KEY in metadata:
        return _Witness(TENSOR_HASH_KEY, metadata[TENSOR_HASH_KEY], _tensor_hash, ours=PROVENANCE_KEY in metadata)
    return None


def _digest_in_state(path: Path) -> str | None:
    """Returns what a checkpoint says of its adapter; None outside a checkpoint, or where it cannot be read."""
    if path.name != ADAPTER_NAME:
        return None
    try:
        return read_json(path.with_name(STATE_NAME), TypeAdapter(_State)).files[ADAPTER_NAME].blake3
    except (DocumentError, KeyError):
        return None


def _digest_without(recorded: str, path: Path) -> str:
    """Returns the digest of a file with a blank in the place of the recorded one."""
    with open(path, "rb") as file:
        text = header_text(file, os.fstat(file.fileno()).st_size)
        header = len(text).to_bytes(8, "little") + text.replace(_item(recorded), _item(_BLANK), 1)
        return hash_chunks(chain([header], iter(lambda: file.read(_PIECE_BYTES), b"")))


def _tensor_hash(path: Path) -> str:
    """Returns sd-scripts' hash: SHA-256 of all that follows the header."""
    with open(path, "rb") as file:
        header_text(file, os.fstat(file.fileno()).st_size)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _item(digest: str) -> bytes:
    return f"{json.dumps(DIGEST_KEY)}:{json.dumps(digest)}".encode()
