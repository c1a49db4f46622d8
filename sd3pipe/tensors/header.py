"""The header of a safetensors file, written and read; what is read is believed only after a check against the file.

Free of torch. Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes, gapless.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sd3pipe.documents import LFS_POINTER, LFS_REMEDY
from sd3pipe.errors import InputError
from sd3pipe.files import nearest_path
from sd3pipe.tensors.entry import ByteRange, TensorEntry

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_NAME = 1000  # the longest name of a real model has some 100 characters
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}

_PICKLE_REFUSED = (
    "is not read, because a .ckpt/.pt file can run code when it is opened: take the model's .safetensors file, or "
    "convert it on a machine without secrets (torch.load(..., weights_only=True), then safetensors.torch.save_file)"
)
_CUT_SHORT = "the file is cut short or damaged: download or copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as it lies in a file; `offset` counts from the start of the file."""

    path: Path
    name: str
    dtype: str  # as safetensors spells it: F32, BF16, F8_E4M3
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def entry(self) -> TensorEntry:
        """The tensor as the bytes that it takes."""
        ranges = (ByteRange(self.path, self.offset, self.nbytes),)
        return TensorEntry(dtype=self.dtype, shape=self.shape, ranges=ranges)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name. Raises InputError for anything else."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, and its metadata. Raises InputError for anything else."""
    refuse_foreign_file(path)
    try:
        with open(path, "rb") as handle:
            file_bytes = handle.seek(0, 2)
            handle.seek(0)
            text = header_text(handle, file_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    start = 8 + len(text)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: damaged header: its metadata are no texts")
    tensors = {name: _tensor(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, tensors, start, file_bytes)
    return tensors, metadata


def header_text(handle: IO[bytes], file_bytes: int) -> bytes:
    """Returns the JSON that a file starts with, and leaves `handle` at its tensors. Raises ValueError, OSError."""
    length = int.from_bytes(handle.read(8), "little")
    if file_bytes < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("not a safetensors file (it does not begin with the length of a header)")
    if 8 + length > file_bytes:
        raise ValueError(f"{file_bytes:,} bytes, but its header alone takes {8 + length:,}: {_CUT_SHORT}")
    return handle.read(length)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Returns the size of a tensor."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def placed(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, Any]:
    """Returns the header's entries of tensors (name, number format, shape) whose bytes follow one another."""
    entries: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return entries


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str], *, unit: int = 8) -> bytes:
    """Returns the start of a file, padded with blanks so that the tensors start on a multiple of `unit` bytes."""
    header = {"__metadata__": dict(metadata), **entries} if metadata else entries
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % unit)
    return len(text).to_bytes(8, "little") + text


def refuse_foreign_file(path: Path) -> None:
    """Raises InputError for what is no readable file, a pickle, a GGUF file or an empty one, saying the way out."""
    if not exists(path):
        raise InputError(f"{path}: no such file{nearest_path(path)}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder: give a .safetensors file")
    if not path.is_file():
        raise InputError(f"{path}: is not a regular file: give a .safetensors file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{path}: {_PICKLE_REFUSED}")
    try:
        with open(path, "rb") as handle:
            start = handle.read(24)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.suffix.lower() == ".gguf" or start.startswith(b"GGUF"):
        raise InputError(f"{path}: GGUF is not supported: take the model's .safetensors file (bf16, fp16 or fp8)")
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        raise InputError(f"{path}: {_PICKLE_REFUSED}")
    if start.startswith(LFS_POINTER):
        raise InputError(f"{path}: {LFS_REMEDY}")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise InputError(f"{path}: is a web page, not a model: the download failed (is the model gated?), do it again")
    if not start:
        raise InputError(f"{path}: the file is empty: download or copy it again")


def exists(path: Path) -> bool:
    """Whether a file or folder is there; False, where Path.exists raises, for a name that none can have."""
    try:
        return path.exists()
    except OSError:
        return False


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and duplicate keys
        why = " ".join(str(error).split())
        why = why if len(why) <= 80 else why[:77] + "..."
        raise InputError(f"{path}: not a safetensors file (its header is not valid JSON: {why})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file (its header is no JSON object)")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    shown = ascii(name)[:120]
    if len(name) > _MAX_NAME:
        raise InputError(f"{path}: damaged header: a tensor's name is {len(name):,} characters long: {shown}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{path}: damaged header: {shown} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"{path}: tensor {shown} has the number format {ascii(dtype)[:40]}, which is not supported")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: damaged header: shape or offsets of {shown} make no sense")
    nbytes = offsets[1] - offsets[0]
    if tensor_bytes(dtype, shape) != nbytes:
        raise InputError(f"{path}: damaged header: {shown} of shape {shape} in {dtype} does not take {nbytes:,} bytes")
    return StoredTensor(path=path, name=name, dtype=dtype, shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], start: int, file_bytes: int) -> None:
    """Checks that the tensors fill the file without gap or overlap."""
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            raise InputError(f"{path}: damaged header: the bytes of {ascii(tensor.name)[:120]} overlap or leave a gap")
        position += tensor.nbytes
    if position > file_bytes:
        raise InputError(f"{path}: {file_bytes:,} bytes, but its header promises {position:,}: {_CUT_SHORT}")
    if position < file_bytes:
        raise InputError(f"{path}: {file_bytes - position:,} bytes too many at its end: {_CUT_SHORT}")
