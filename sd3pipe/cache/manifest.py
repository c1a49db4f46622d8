"""manifest.json: what a cache is, and which index is its present one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3pipe.cache.keys import FORMAT_VERSION, KINDS, Kind
from sd3pipe.errors import InputError

READABLE_FORMATS = (FORMAT_VERSION,)
_OWN = (
    "format",
    "kind",
    "recipe",
    "recipe_version",
    "fingerprints",
    "subsets",
    "quarantined",
    "rows",
    "samples",
    "index",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The published state of a cache. Nothing in it depends on a machine, a path or a time."""

    kind: Kind
    recipe: Mapping[str, Any]
    recipe_version: int
    fingerprints: Mapping[str, str]
    subsets: Mapping[str, Mapping[str, Any]]  # what weights and orders samples, by subset; in no key
    quarantined: tuple[
        Mapping[str, Any], ...
    ]  # name, subset, image_hash, reason; keys for pictures that failed to encode
    rows: int
    samples: int
    index: str  # the hash that names the present index
    extra: Mapping[str, Any] = field(default_factory=dict)

    def unreadable_rows(self) -> dict[str, str]:
        """Returns the reason for each row, by key, that an encoder could not make."""
        return {key: entry["reason"] for entry in self.quarantined for key in entry.get("keys", ())}

    def to_bytes(self) -> bytes:
        """Returns the file's content."""
        value: dict[str, Any] = {name: getattr(self, name) for name in _OWN if name != "format"}
        value |= {"format": FORMAT_VERSION, **self.extra}
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
        return (text + "\n").encode("utf-8", "surrogateescape")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Returns the manifest in a file's bytes. Raises InputError for a damaged, foreign or newer one."""
    try:
        value = json.loads(data.decode("utf-8", "surrogateescape"))
        version = value["format"]
        if version in READABLE_FORMATS:
            own = {name: value[name] for name in _OWN if name != "format"}
            own["quarantined"] = tuple(own["quarantined"])
            manifest = Manifest(**own, extra={name: item for name, item in value.items() if name not in _OWN})
            if manifest.kind not in KINDS or len(bytes.fromhex(manifest.index)) != 32:
                raise ValueError(f"kind {manifest.kind}, index {manifest.index}")
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where} is damaged or no manifest of a cache ({error}): "
            "restore it, or run `sd3pipe cache verify --repair`"
        ) from error
    raise InputError(
        f"{where} has format {version}, this sd3pipe reads {', '.join(map(str, READABLE_FORMATS))}: update it"
    )


def read_manifest(path: Path) -> Manifest | None:
    """Returns a cache folder's manifest, None where nothing was published. Raises InputError."""
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
