"""Adapter files: read from any known form, written in three, read back and compared before they get their name."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.adapters.forms import Parsed, parse, prepared, tensors_of
from sd3pipe.adapters.integrity import TENSOR_HASH_KEY, check_bytes, with_digest
from sd3pipe.adapters.keymap import Form, is_text_encoder
from sd3pipe.adapters.kind import Adapter, Delta
from sd3pipe.adapters.peft_config import needed_config, read_strengths
from sd3pipe.adapters.recognise import describe, foreign_kind
from sd3pipe.adapters.sizes import depth_of, fitting_variants
from sd3pipe.console import listed
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.files import atomic_file
from sd3pipe.fingerprint import hash_chunks, hash_file
from sd3pipe.tensors.formats import FORMAT_NAMES, TORCH_FORMATS
from sd3pipe.tensors.header import StoredTensor, read_header_and_metadata
from sd3pipe.tensors.reader import read_stored
from sd3pipe.tensors.writer import data_sha256, file_pieces, in_file_order, write_tensors
from sd3pipe.words import MMDiTVariant, StoredFormat

log = logging.getLogger(__name__)

_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_SHOWN_KEYS = 6

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP16_TOLERANCE = 1e-3  # relative error of a module's change up to which `auto` stores fp16
_TOLERANCES: Mapping[str, float] = {"auto": FP16_TOLERANCE, "same": 1e-6, "fp32": 1e-6, "fp16": 1e-2, "bf16": 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter as it was read: factors by native module path, whatever form the file has."""

    path: Path
    forms: tuple[Form, ...]
    adapter: dict[str, Delta]
    metadata: dict[str, str]
    unknown: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {path: delta.shape for path, delta in self.adapter.items()}

    @property
    def depth(self) -> int:
        """The number of blocks of the model that it fits; 0 where it adapts text encoders alone."""
        return depth_of(self.sizes)

    @property
    def variants(self) -> tuple[MMDiTVariant, ...]:
        """The public models that have all its modules."""
        return fitting_variants(self.sizes)

    @property
    def model_part(self) -> dict[str, Delta]:
        """The part that changes the MMDiT; a warning tells what else there is."""
        part = {path: delta for path, delta in self.adapter.items() if not is_text_encoder(path)}
        if len(part) < len(self.adapter):
            log.warning("%s: %d layers of text encoders are left out", self.path, len(self.adapter) - len(part))
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """What was written, and how far the written changes are from those that were to be written."""

    path: Path
    form: Form
    dtypes: tuple[str, ...]
    modules: int
    nbytes: int
    largest_difference: float
    largest_at: str


def read_adapter(path: Path, *, ignore_unknown: bool = False) -> AdapterFile:
    """Returns the adapter in a safetensors file of any known form.

    Raises InputError for a damaged or foreign file, saying what it seems to be, and for keys that stand for nothing in
    an SD3 model unless `ignore_unknown`, which lists them in a warning; most of a file is never left out.
    """
    stored, metadata = _checked_header(path)
    tensors = {name: _kept(tensor) for name, tensor in read_stored(stored).items()}
    return _parsed(path, tensors, metadata, ignore_unknown=ignore_unknown)


def _parsed(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, ignore_unknown: bool = False
) -> AdapterFile:
    strength = read_strengths(path, metadata)
    try:
        parsed = parse(tensors, strength=strength, metadata={**metadata, **strength.notes})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not parsed.adapter:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{path}: is no SD3 adapter: it seems to be {describe(shapes)}")
    if parsed.unknown:
        _tell_unknown(path, parsed, ignore_unknown)
    return AdapterFile(
        path=path,
        forms=tuple(sorted(parsed.forms)),
        adapter=parsed.adapter,
        metadata=metadata,
        unknown=tuple(parsed.unknown),
    )


@dataclass(frozen=True, slots=True)
class Rounded:
    """A delta as it will be stored, and how far its change then is from the source's, relative to it."""

    delta: Delta
    error: float


def rounded_adapter(source: Adapter, held: Adapter, dtype: StoredFormat) -> dict[str, Rounded]:
    """Returns each delta of `held`, which changes the model as `source` does, as it will be stored.

    `auto` is fp16 where every module keeps within FP16_TOLERANCE, else fp32. Raises ParameterError where a number
    format cannot hold a module.
    """
    result: dict[str, Rounded] = {}
    for path, delta in held.items():
        result[path] = _rounded(source[path], delta, dtype)
        if dtype == "auto" and not result[path].error < FP16_TOLERANCE:
            return rounded_adapter(source, held, "fp32")
        check_error(path, result[path].error, dtype)
    return result


def check_error(path: str, error: float, dtype: StoredFormat) -> None:
    """Raises ParameterError where a module's change differs by more than its number format explains."""
    if not error <= _TOLERANCES[dtype]:
        raise ParameterError(
            f"{path} would change by {error:.1e} of itself when stored as {dtype}, and at most "
            f"{_TOLERANCES[dtype]:.0e} is accepted: use --dtype fp32"
        )


def save_adapter(
    path: Path,
    adapter: Adapter,
    *,
    form: Form = "comfyui",
    dtype: StoredFormat = "fp32",
    metadata: Mapping[str, str] | None = None,
) -> SavedAdapter:
    """Writes an adapter under a temporary name, reads it back, compares every module, and only then names it.

    Without `metadata` only what is needed to load it is written beside the tensors. Raises ParameterError where the
    form or the dtype cannot hold the adapter, StorageError.
    """
    rounded = rounded_adapter(adapter, prepared(adapter, form), dtype)
    stored = {place: found.delta for place, found in rounded.items()}
    tensors = in_file_order(tensors_of(stored, form))
    header = {"format": "pt"} | {key: note for delta in stored.values() for key, note in delta.notes().items()}
    header |= needed_config(tensors) if form == "diffusers" else {}
    if metadata is not None:
        digest = data_sha256(tensors)
        header = {**metadata, TENSOR_HASH_KEY: digest, "modelspec.hash_sha256": "0x" + digest} | header
        header = with_digest(tensors, header)
    with atomic_file(path) as handle:
        write_tensors(handle, tensors, header)
        handle.flush()
        nbytes = handle.tell()
        error, where = compare(adapter, _read_back(Path(handle.name), tensors, header).adapter, rounded)
        check_error(where, error, dtype)
    return SavedAdapter(
        path=path,
        form=form,
        dtypes=tuple(sorted({FORMAT_NAMES[tensor.dtype] for tensor in tensors.values() if tensor.ndim > 1})),
        modules=len(adapter),
        nbytes=nbytes,
        largest_difference=error,
        largest_at=where,
    )


def _read_back(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> AdapterFile:
    """Returns what a file holds that was written from these tensors.

    Its bytes are compared with theirs, so that they need not be in memory twice. Raises InputError where they differ.
    """
    stored, metadata = _checked_header(path)
    if hash_file(path) != hash_chunks(file_pieces(tensors, header)):
        raise InputError(f"{path}: the bytes on the disk are not those that were written: check the disk")
    return _parsed(path, {name: _kept(tensors[name]) for name in stored}, metadata)


def compare(source: Adapter, written: Adapter, rounded: Mapping[str, Rounded] | None = None) -> tuple[float, str]:
    """Returns the largest relative difference of a module's change, and the module; infinity where one is missing.

    What is known of factors that were `rounded`, and written like that, is not computed again.
    """
    odd = sorted(source.keys() ^ written.keys())
    if odd:
        return float("inf"), odd[0]
    errors: dict[str, float] = {}
    for path, delta in source.items():
        known = rounded[path] if rounded else None
        errors[path] = known.error if known and known.delta.same_as(written[path]) else delta.difference(written[path])
    where = max(errors, key=lambda path: errors[path])
    return errors[where], where


def _tell_unknown(path: Path, parsed: Parsed, ignore_unknown: bool) -> None:
    """Warns of keys that are left out. Raises InputError where they may not be."""
    shown = listed([ascii(key)[1:101] for key in parsed.unknown], _SHOWN_KEYS)
    unknown, modules = len(parsed.unknown_modules), len(parsed.unknown_modules) + parsed.modules
    if unknown > parsed.modules:
        raise InputError(
            f"{path}: {unknown} of {modules} modules stand for nothing in an SD3 model: {shown}; "
            "without them it would be another adapter"
        )
    message = f"{path}: {len(parsed.unknown)} keys stand for nothing in an SD3 model: {shown}"
    if not ignore_unknown:
        raise InputError(f"{message}; `sd3pipe adapter convert --ignore-unknown` leaves them out")
    log.warning("%s: left out, %d of %d modules", message, unknown, modules)


def _checked_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the header and the metadata of a file, once its names and shapes say that it may be an adapter.

    Factors are plain floats; a single number, such as alpha, may be whole.
    """
    stored, metadata = read_header_and_metadata(path)
    kind = foreign_kind({name: tensor.shape for name, tensor in stored.items()})
    if kind:
        raise InputError(f"{path}: is no SD3 adapter: it seems to be {kind}")
    check_bytes(path, metadata)
    for name, tensor in stored.items():
        if tensor.dtype not in _FLOATS and (math.prod(tensor.shape) > 1 or tensor.dtype not in TORCH_FORMATS):
            raise InputError(
                f"{path}: {ascii(name)[1:101]} is stored as {tensor.dtype}, and adapters are read in "
                f"{', '.join(_FLOATS)}"
            )
    return stored, metadata


def _kept(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in DTYPES.values() else tensor.float()


def _rounded(source: Delta, held: Delta, dtype: StoredFormat) -> Rounded:
    """Returns a delta in a number format; factors of fp16 are balanced where that helps."""
    if dtype == "same":
        return Rounded(held, source.difference(held))
    plain = held.cast(DTYPES.get(dtype, torch.float16))
    found = Rounded(plain, source.difference(plain))
    if dtype not in ("auto", "fp16") or found.error < FP16_TOLERANCE / 2:
        return found
    balanced = held.balanced()
    if balanced is held:
        return found
    balanced = balanced.cast(torch.float16)
    other = Rounded(balanced, source.difference(balanced))
    return other if other.error < found.error or math.isnan(found.error) else found
