"""Content identities: blake3 over bytes and over canonical JSON. No path, time or order ever enters one."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from blake3 import blake3

from sd3pipe.files import open_regular

_CHUNK_BYTES = 4 << 20
_HASH = re.compile("[0-9a-f]{64}")
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical_json(value: object) -> bytes:
    """Returns the one byte string that stands for `value`: sorted keys, no blanks, UTF-8, no NaN."""
    return _canonical(value).encode("utf-8", "surrogatepass")


def digest_bytes(data: bytes | memoryview) -> bytes:
    """Returns the 32-byte blake3 digest of `data`."""
    return blake3(data).digest()


def hash_bytes(data: bytes | memoryview) -> str:
    """Returns the blake3 digest of `data` as 64 hex digits."""
    return blake3(data).hexdigest()


def hash_json(value: object) -> str:
    """Returns the blake3 digest of the canonical JSON of `value` as 64 hex digits."""
    return hash_bytes(canonical_json(value))


def is_hash(value: object) -> TypeGuard[str]:
    """Whether a value that was read is a digest as 64 hex digits."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def hash_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Returns the blake3 digest of the concatenated chunks as 64 hex digits."""
    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """Returns the blake3 digest of a file's bytes as 64 hex digits. Raises OSError, also for a pipe or a device."""
    with open_regular(path) as handle:
        return hash_chunks(iter(lambda: handle.read(_CHUNK_BYTES), b""))
