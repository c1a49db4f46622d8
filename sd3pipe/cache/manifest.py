"""manifest.json: what a cache is, and which index is its present one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, JsonValue, StrictBool, StrictInt, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.cache.keys import FORMAT_VERSION, Ingredients, Kind
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, checked, parse_json, read_data
from sd3pipe.errors import InputError

READABLE_FORMATS = (FORMAT_VERSION,)
_MARK = "imported_from"  # of rows that another program made, and of a cache that has some
_UNLIKE_OURS = {_MARK, "latent_mode", "vae_dtype"}  # their recipes have these otherwise than the manifest
_Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
_Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@with_config(extra="allow")
class _Settings(TypedDict, total=False):
    dataset: _Count
    num_repeats: _Count
    is_reg: StrictBool
    prior_loss_weight: _Number | None
    loss_weight: _Number | None
    caption_dropout_rate: Annotated[_Number, Field(le=1)]
    caption_dropout_every_n_epochs: _Count
    diff_output_preservation: StrictBool


@with_config(extra="allow")
class _Unreadable(TypedDict):
    name: str
    reason: str
    subset: NotRequired[str]
    image_hash: NotRequired[str]
    keys: NotRequired[list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The published state of a cache. Nothing in it depends on a machine, a path or a time."""

    kind: Kind
    recipe: Mapping[str, JsonValue]
    recipe_version: _Count
    fingerprints: Mapping[str, str]
    subsets: Mapping[str, _Settings]  # what weights and orders samples, by subset; in no key
    quarantined: tuple[_Unreadable, ...]  # pictures that are left out; `keys` where encoding them failed
    rows: _Count
    samples: _Count
    index: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # the hash that names the present index
    tags: Mapping[str, Mapping[str, _Count]] = field(default_factory=dict)  # by subset: how many captions have each
    extra: Mapping[str, JsonValue] = field(default_factory=dict)  # further fields of the file

    def unreadable_rows(self) -> dict[str, str]:
        """Returns the reason for each row, by key, that an encoder could not make."""
        return {key: entry["reason"] for entry in self.quarantined for key in entry.get("keys", ())}

    def to_bytes(self) -> bytes:
        value = {name: getattr(self, name) for name in _FIELDS} | {"format": FORMAT_VERSION, **self.extra}
        if not self.tags:
            del value["tags"]
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
        return (text + "\n").encode("utf-8", "surrogateescape")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Returns the manifest in a file's bytes. Raises InputError for a damaged, foreign or newer one."""
    try:
        value = parse_json(data, _OBJECT, where)
        version = value.pop("format", None)
        if version in READABLE_FORMATS:
            own = {name: value.pop(name) for name in _FIELDS if name in value}
            return checked(own | {"extra": value}, _MANIFEST, where)
    except DocumentError as error:
        raise InputError(
            f"{error}: it is damaged or no manifest of a cache: restore it, or run `sd3pipe cache verify --repair`"
        ) from error
    raise InputError(
        f"{where} has format {version}, this sd3pipe reads {', '.join(map(str, READABLE_FORMATS))}: update it"
    )


def read_manifest(path: Path) -> Manifest | None:
    """Returns a cache folder's manifest, None where nothing was published. Raises InputError."""
    try:
        data = read_data(path, most_bytes=MOST_LIST_BYTES)
    except DocumentError as error:
        if error.missing:
            return None
        raise
    return parse_manifest(data, str(path))


def contradiction(manifest: Manifest, made_from: Ingredients) -> str:
    """Returns what the manifest says otherwise than some rows' own ingredients, which their segment's header has.

    Nothing where they agree. Rows may have more in their recipe than the manifest: what is a picture's own.
    """
    if manifest.recipe_version != made_from.recipe_version:
        return _differ("recipe_version", manifest.recipe_version, made_from.recipe_version)
    for name in sorted({*manifest.fingerprints, *made_from.fingerprints}):
        said, true = manifest.fingerprints.get(name), made_from.fingerprints.get(name)
        if said != true:
            return _differ(f"fingerprints.{name}", said, true)
    for name, said in manifest.recipe.items():
        true = made_from.recipe.get(name)
        if said != true and not (name in _UNLIKE_OURS and _MARK in manifest.recipe):
            return _differ(f"recipe.{name}", said, true)
    return ""


def _differ(name: str, said: object, true: object) -> str:
    return f"says {name} = {_short(said)}, its rows were made with {_short(true)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


_FIELDS = tuple(item.name for item in fields(Manifest) if item.name != "extra")
_MANIFEST = TypeAdapter(Manifest)
_OBJECT = TypeAdapter(dict[str, Any])
