"""Finds a component's tensors in a diffusers folder, be it on the disk or on the hub. Free of torch."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from sd3pipe.console import listed
from sd3pipe.documents import DocumentError, checked, read_json
from sd3pipe.errors import InputError
from sd3pipe.models.layouts import OPTIONS, TITLES, Component
from sd3pipe.tensors.header import PICKLE_SUFFIXES, StoredTensor, read_header

Fetch = Callable[[str], Path | None]  # the local path of a file of the folder, None if there is none

SUBFOLDERS: dict[Component, str] = {
    "mmdit": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
}
_MAX_INDEX_BYTES = 10_000_000
_LONGEST_NAME = 255  # bytes that a file system takes
_INDEX = TypeAdapter(dict[str, object])


def folder_tensors(component: Component, fetch: Fetch) -> dict[str, StoredTensor] | None:
    """Returns a component's tensors by diffusers name, None if its folder, from which `fetch` takes files, has none.

    Full precision comes before fp16 where a folder has both. Raises InputError for damaged files.
    """
    stem = "diffusion_pytorch_model" if component in ("mmdit", "vae") else "model"
    for variant in ("", ".fp16"):
        index = fetch(f"{stem}.safetensors.index{variant}.json")
        if index is not None:
            return _sharded_tensors(index, fetch)
        file = fetch(f"{stem}{variant}.safetensors")
        if file is not None:
            return read_header(file)
    return None


def missing_in_folder(folder: Path, component: Component) -> InputError:
    """Returns the error for a folder without weights of a component, saying what there is instead."""
    title, option = TITLES[component], OPTIONS[component]
    subfolder = folder / SUBFOLDERS[component]
    if pickled := _files(subfolder, PICKLE_SUFFIXES):
        return InputError(
            f"{subfolder}: only {listed(pickled)}, which is not read, because it can run code when it is opened: "
            "get the .safetensors files of this model"
        )
    if single := _files(folder, {".safetensors"}):
        return InputError(f"{folder}: not a diffusers folder; it has {listed(single)}: pass one of them as {option}")
    if subfolder.is_dir():
        return InputError(f"{subfolder}: no weights in it (.safetensors): download the folder again")
    if any((folder / name).is_dir() for name in SUBFOLDERS.values()):
        way_out = "pass a folder that has it" if component == "mmdit" else f"pass {option} FILE"
        return InputError(f"{folder}: holds no {title} (no {SUBFOLDERS[component]}/): {way_out}")
    return InputError(f"{folder}: not a diffusers folder (no {SUBFOLDERS[component]}/ in it): pass a .safetensors file")


def _sharded_tensors(index: Path, fetch: Fetch) -> dict[str, StoredTensor]:
    try:
        content = read_json(index, _INDEX, most_bytes=_MAX_INDEX_BYTES)
        pairs = checked(content["weight_map"], _INDEX, str(index)).items()
    except (DocumentError, KeyError) as error:
        raise InputError(f"{index}: damaged: no weight_map in it: download the folder again") from error
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in pairs:
        if not isinstance(shard, str) or shard != PurePosixPath(shard).name or "\\" in shard or not shard:
            raise InputError(f"{index}: names a file outside its folder: {ascii(shard)[:80]}")
        if len(shard.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
            raise InputError(f"{index}: names a file with a name too long for one: {ascii(shard)[:80]}")
        if shard not in shards:
            path = fetch(shard)
            if path is None:
                raise InputError(f"{index}: names the file {shard}, which is missing: download the folder again")
            shards[shard] = read_header(path)
        if name not in shards[shard]:
            raise InputError(f"{index}: says that {shard} holds {name}, but it does not: download the folder again")
        tensors[name] = shards[shard][name]
    return tensors


def _files(folder: Path, suffixes: set[str]) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
