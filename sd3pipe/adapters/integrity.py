"""Whether an adapter file's bytes are those that were written, by the best witness that there is.

The file's own digest covers every byte of it. Older files of train have one in their checkpoint's state.json, or only
sd-scripts' hash of the tensors, which other programs carry along when they change a file.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
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


class _StoredFile(BaseModel):
    blake3: str


class _State(BaseModel):
    files: dict[str, _StoredFile]


def with_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata with the digest of the file that write_tensors makes of these tensors and of it."""
    blank = {**metadata, DIGEST_KEY: _BLANK}
    return {**metadata, DIGEST_KEY: hash_chunks(file_pieces(tensors, blank))}


def check_bytes(path: Path, metadata: Mapping[str, str]) -> None:
    """Compares a file that can be parsed with what is recorded of its bytes, by the best witness; there may be none.

    Raises InputError where sd3pipe wrote it otherwise; a hash of another program that does not match is a warning.
    """
    if DIGEST_KEY in metadata:
        where, intact = DIGEST_KEY, _digest_without(path, metadata[DIGEST_KEY]) == metadata[DIGEST_KEY]
    elif (in_state := _digest_in_state(path)) is not None:
        where, intact = f"{STATE_NAME} beside it", hash_file(path) == in_state
    elif TENSOR_HASH_KEY in metadata:
        where, intact = TENSOR_HASH_KEY, _tensor_hash(path) == metadata[TENSOR_HASH_KEY]
    else:
        return
    if not intact and where == TENSOR_HASH_KEY and PROVENANCE_KEY not in metadata:
        log.warning(
            "%s: its tensors do not match the hash in its metadata (%s): it is damaged, or a program changed it and "
            "left the old hash",
            path,
            where,
        )
    elif not intact:
        raise InputError(
            f"{path}: is damaged: its bytes are not those that sd3pipe wrote ({where}): copy it again, make it "
            "again from its run, or take another checkpoint; after a change on purpose, save it without that metadata"
        )


def _digest_in_state(path: Path) -> str | None:
    """Returns what a checkpoint says of its adapter; None outside a checkpoint, or where it cannot be read."""
    if path.name != ADAPTER_NAME:
        return None
    try:
        return read_json(path.with_name(STATE_NAME), TypeAdapter(_State)).files[ADAPTER_NAME].blake3
    except (DocumentError, KeyError):
        return None


def _digest_without(path: Path, recorded: str) -> str:
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
