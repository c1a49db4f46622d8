"""manifest.json: what a cache is, and which index is its present one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, JsonValue, StrictBool, StrictInt, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from sd3pipe.cache.keys import FORMAT_VERSION, Kind
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, checked, parse_json, read_data
from sd3pipe.errors import InputError

READABLE_FORMATS = (FORMAT_VERSION,)
_ANYTHING_ELSE = ConfigDict(extra="allow")
_Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
_Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class _Settings(TypedDict, total=False):
    __pydantic_config__ = _ANYTHING_ELSE  # pyright: ignore[reportGeneralTypeIssues]

    dataset: _Count
    num_repeats: _Count
    is_reg: StrictBool
    prior_loss_weight: _Number | None
    loss_weight: _Number | None
    caption_dropout_rate: Annotated[_Number, Field(le=1)]
    caption_dropout_every_n_epochs: _Count
    diff_output_preservation: StrictBool


class _Unreadable(TypedDict):
    __pydantic_config__ = _ANYTHING_ELSE  # pyright: ignore[reportGeneralTypeIssues]

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
    extra: Mapping[str, JsonValue] = field(default_factory=dict)  # further fields of the file

    def unreadable_rows(self) -> dict[str, str]:
        """Returns the reason for each row, by key, that an encoder could not make."""
        return {key: entry["reason"] for entry in self.quarantined for key in entry.get("keys", ())}

    def to_bytes(self) -> bytes:
        """Returns the file's content."""
        value = {name: getattr(self, name) for name in _FIELDS} | {"format": FORMAT_VERSION, **self.extra}
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


_FIELDS = tuple(item.name for item in fields(Manifest) if item.name != "extra")
_MANIFEST = TypeAdapter(Manifest)
_OBJECT = TypeAdapter(dict[str, Any])
