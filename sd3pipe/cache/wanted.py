"""What an encode stage wants in its cache: rows, samples, and what the manifest says about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sd3pipe.cache.keys import Kind, row_key
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.samples import Columns, select
from sd3pipe.cache.segment import Ingredients
from sd3pipe.fingerprint import hash_json


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The whole content of a cache, known before anything is encoded. `samples` has the columns of cache/samples.py."""

    kind: Kind
    recipe_version: int
    fingerprints: Mapping[str, str]
    recipe: Mapping[str, Any]  # as the manifest shows it; the rows' own recipes make the keys
    rows: Sequence[WantedRow]
    samples: Columns
    subsets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quarantined: Sequence[Mapping[str, Any]] = ()  # name, subset, image_hash ("" if unknown), reason
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of the manifest

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each row; equal rows have equal keys."""
        return tuple(
            row_key(
                kind=self.kind,
                source=row.source,
                recipe=row.recipe,
                recipe_version=self.recipe_version,
                fingerprints=self.fingerprints,
            )
            for row in self.rows
        )

    @cached_property
    def row_by_key(self) -> dict[str, WantedRow]:
        """The rows by their keys."""
        return dict(zip(self.keys, self.rows, strict=True))

    @cached_property
    def identity(self) -> str:
        """The hash of all that would be published: writers of equal identity may share a folder."""
        groups = sorted((key, row.group, row.nbytes) for key, row in self.row_by_key.items())
        about = [self.kind, self.recipe_version, self.fingerprints, self.recipe, self.subsets, self.extra]
        columns = {name: list(values) for name, values in self.samples.items()}
        return hash_json([about, groups, columns, list(self.quarantined)])

    def ingredients(self, key: str) -> Ingredients:
        """Returns what a row's key is made of."""
        return Ingredients(
            recipe=self.row_by_key[key].recipe, recipe_version=self.recipe_version, fingerprints=self.fingerprints
        )

    def without(self, unreadable: Mapping[str, str]) -> "Readable":
        """Returns what remains when some rows, given with reasons, cannot be made: their pictures go as a whole."""
        if not unreadable:
            return Readable(keys=frozenset(self.keys), samples=self.samples, quarantined=_sorted(self.quarantined))
        identity = [name for name in ("name", "subset", "image_hash") if name in self.samples]
        pictures = list(zip(*(self.samples[name] for name in identity), strict=True))
        bad: dict[tuple[Any, ...], dict[str, Any]] = {}
        for picture, key in self._uses(pictures):
            if key in unreadable:
                about = dict(zip(identity, picture, strict=True))
                entry = bad.setdefault(picture, {**about, "reason": unreadable[key], "keys": []})
                entry["keys"] = sorted({*entry["keys"], key})
        keep = [picture not in bad for picture in pictures]
        used, kept = set(), set()
        for picture, key in self._uses(pictures):
            used.add(key)
            if picture not in bad:
                kept.add(key)
        keys = {key for key in self.keys if key not in unreadable and (key in kept or key not in used)}
        quarantined = _sorted([*self.quarantined, *bad.values()])
        return Readable(keys=frozenset(keys), samples=select(self.samples, keep), quarantined=quarantined)

    def _uses(self, pictures: Sequence[tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], str]]:
        """Returns each use of a row by a picture."""
        columns = [values for name, values in self.samples.items() if name in ("key", "negative_key")]
        return [(picture, key) for keys in columns for picture, key in zip(pictures, keys, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """The rows and samples that can be published, and the pictures that cannot."""

    keys: frozenset[str]
    samples: Columns
    quarantined: tuple[Mapping[str, Any], ...]


def _sorted(entries: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Returns quarantine entries in an order that depends on nothing but them."""
    names = ("subset", "name", "image_hash", "reason")
    return tuple(sorted(map(dict, entries), key=lambda entry: tuple(str(entry.get(name, "")) for name in names)))
