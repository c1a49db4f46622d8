"""Where the tensors of a model component lie: one checkpoint, files apart, a diffusers folder or a hub repository.

Whatever the layout, a component is a map from canonical key (native MMDiT and VAE keys, transformers' text encoder
names) to byte ranges of files. Nothing is read here but headers, so this needs no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.diffusers_keys import modules_of, native_names
from sd3pipe.models.fp8_scales import FP8_DTYPES, take_scales
from sd3pipe.models.hub import HubRepository, is_hub_id
from sd3pipe.models.layouts import (
    OPTIONS,
    TITLES,
    Component,
    canonical_text_names,
    components_in,
    find_part,
    foreign_kind,
    names_of_part,
)
from sd3pipe.models.model_folder import SUBFOLDERS, folder_tensors, missing_in_folder
from sd3pipe.tensors.entry import ByteRange, TensorEntry
from sd3pipe.tensors.hash import hash_tensors
from sd3pipe.tensors.header import StoredTensor, exists, read_header

_FLOATS = {"F64", "F32", "F16", "BF16", *FP8_DTYPES}
_CLIP_WIDTHS: dict[int, Component] = {768: "clip_l", 1280: "clip_g"}  # the published sizes, to catch an exchange
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$|\.safetensors\.index(\.\w+)?\.json$")
_TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSource:
    """One component of a model: where it was found, and its tensors by canonical key."""

    component: Component
    where: str  # for messages
    tensors: Mapping[str, TensorEntry]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every canonical key."""
        return {key: entry.shape for key, entry in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The bytes that the tensors take on the disk."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors, each once."""
        return tuple(dict.fromkeys(path for entry in self.tensors.values() for path in entry.paths))

    def fingerprint(self, stamps: FileStamps | None = None) -> str:
        """Returns the hash over name, dtype, shape and bytes of all tensors, as 64 hex digits.

        With a stamps, unchanged files are not read again; saving the memory is the caller's. Raises InputError.
        """
        return hash_tensors(self.tensors, stamps)


def find_component(component: Component, *, model: str | Path | None, file: Path | None = None) -> ComponentSource:
    """Returns where a component lies: in `file` if given, else in `model` (file, diffusers folder or hub id).

    Raises InputError, in one line with the way out, if it is not there or what is there is of another kind, and
    NetworkError for a hub id that cannot be had.
    """
    if file is not None:
        return _in_path(component, Path(file).expanduser(), is_model=False)
    if isinstance(model, str) and "://" in model:
        raise InputError(f"{model}: web addresses are not read: pass a hub id (OWNER/NAME) or a downloaded file")
    if model is None:
        raise InputError(f"nothing to take the {TITLES[component]} from: pass --model, or {OPTIONS[component]} FILE")
    path = Path(model).expanduser()
    if exists(path) or not is_hub_id(str(model)):
        return _in_path(component, path, is_model=True)
    repository, subfolder = HubRepository(str(model)), SUBFOLDERS[component]
    tensors = folder_tensors(component, lambda name: repository.fetch(f"{subfolder}/{name}"))
    if tensors is not None:
        return _component(component, tensors, f"{repository.repo}/{subfolder} on the hub", is_model=True)
    if repository.unreachable:
        raise repository.offline_error(TITLES[component])
    raise InputError(
        f"{repository.repo}: this hub repository has no {subfolder}/ with .safetensors weights: name one in the "
        "diffusers layout, or download its single file and pass that"
    )


def _in_path(component: Component, path: Path, *, is_model: bool) -> ComponentSource:
    if not exists(path) or not path.is_dir():
        if _SHARD.search(path.name) and exists(path):  # only the folder tells the whole
            raise InputError(f"{path}: is one file of several: pass their folder, {path.parent}")
        return _component(component, read_header(path), str(path), is_model=is_model)
    folder = path / SUBFOLDERS[component] if (path / SUBFOLDERS[component]).is_dir() else path
    tensors = folder_tensors(component, lambda name: folder / name if (folder / name).is_file() else None)
    if tensors is None:
        raise missing_in_folder(path, component)
    return _component(component, tensors, str(folder), is_model=is_model)


def _component(
    component: Component, stored: Mapping[str, StoredTensor], where: str, *, is_model: bool
) -> ComponentSource:
    """Returns the component among stored tensors under canonical keys."""
    if kind := foreign_kind(stored.keys()):
        way_out = "" if ":" in kind else f", not Stable Diffusion 3 or 3.5: pass an SD3 file as {OPTIONS[component]}"
        raise InputError(f"{where}: {kind}{way_out}")
    part = find_part(stored.keys(), component)
    if part is None:
        raise _not_in_file(component, stored, where, is_model=is_model)
    named = {name: stored[full_name] for name, full_name in names_of_part(stored, part).items()}
    weights, scales = take_scales(named, where)
    if component in ("mmdit", "vae") and part.naming == "diffusers":
        if scales:
            raise InputError(f"{where}: scaled fp8 in diffusers' names is not supported: pass the bf16 or fp16 weights")
        entries = _entries_from_diffusers(component, weights, where)
    else:
        is_text = component not in ("mmdit", "vae")
        names = canonical_text_names(weights.keys(), component) if is_text else {name: name for name in weights}
        entries = {
            key: replace(weights[name].entry, scale=scales[name].entry if name in scales else None)
            for key, name in names.items()
        }
    _check_entries(component, entries, where)
    return ComponentSource(component=component, where=where, tensors=entries)


def _entries_from_diffusers(
    component: Component, stored: Mapping[str, StoredTensor], where: str
) -> dict[str, TensorEntry]:
    natives = native_names(stored.keys(), modules_of(component, stored.keys()))
    used = {name for found in natives.values() for name in found.names}
    if missing := sorted(used - stored.keys()):
        raise InputError(f"{where}: {missing[0]} is missing: download the folder again")
    if unknown := sorted(stored.keys() - used):
        raise InputError(f"{where}: the {TITLES[component]} has tensors that are not understood: {unknown[0]}")
    entries = {}
    for key, found in natives.items():
        entry = _joined([stored[name] for name in found.names], where)
        if found.halves_swapped:  # diffusers has scale before shift
            (whole,) = entry.ranges
            if entry.shape[0] % 2:
                raise InputError(
                    f"{where}: a modulation of {entry.shape[0]} rows cannot be halved: the file is damaged"
                )
            half = whole.nbytes // 2
            ranges = (ByteRange(whole.path, whole.offset + half, half), ByteRange(whole.path, whole.offset, half))
            entry = replace(entry, ranges=ranges)
        elif ".attn_1." in key and len(entry.shape) == 2:  # the VAE's attention natively has 1 x 1 convolutions
            entry = replace(entry, shape=(*entry.shape, 1, 1))
        entries[key] = entry
    return entries


def _joined(parts: list[StoredTensor], where: str) -> TensorEntry:
    """Returns the tensor whose rows are those of the parts, one after the other."""
    first = parts[0]
    if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.shape for part in parts):
        raise InputError(f"{where}: {first.name} and its companions differ in width or number format")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    ranges = tuple(where for part in parts for where in part.entry.ranges)
    return TensorEntry(dtype=first.dtype, shape=shape, ranges=ranges)


def _check_entries(component: Component, entries: Mapping[str, TensorEntry], where: str) -> None:
    """Raises InputError for numbers of no known format, and for one published CLIP given as the other."""
    for key, entry in entries.items():
        if entry.dtype not in _FLOATS:
            raise InputError(
                f"{where}: {key} is stored as {entry.dtype}, so it is quantised in a way that is not understood: "
                "pass the bf16, fp16 or fp8 file"
            )
    embedding = entries.get(_TOKEN_EMBEDDING)
    found = _CLIP_WIDTHS.get(embedding.shape[-1]) if embedding is not None and embedding.shape else None
    if found is not None and found != component:
        raise InputError(
            f"{where}: is {TITLES[found]} (its width tells), not {TITLES[component]}: pass it as {OPTIONS[found]}"
        )


def _not_in_file(component: Component, stored: Mapping[str, StoredTensor], where: str, *, is_model: bool) -> InputError:
    title, option = TITLES[component], OPTIONS[component]
    held = components_in(stored.keys())
    if not held:
        example = f" (it begins with {ascii(min(stored))[:80]})" if stored else " (it has no tensors)"
        return InputError(f"{where}: holds no part of Stable Diffusion 3{example}: pass another file as {option}")
    holds = " and ".join((", ".join(held[:-1]), held[-1])) if len(held) > 1 else held[0]
    if component == "mmdit":
        return InputError(f"{where}: holds no MMDiT (it holds {holds}): pass a checkpoint that has it as --model")
    way_out = f"pass {option} FILE" if is_model else f"pass another file as {option}"
    return InputError(f"{where}: holds no {title} (it holds {holds}): {way_out}")
