"""What an encode stage wants in its cache: rows, samples, and what the manifest says about them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sd3pipe.cache.keys import Ingredients, Kind
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.samples import Columns, row_columns, select
from sd3pipe.fingerprint import hash_json

MOST_TAGS = 1000  # of a subset, the most frequent; sentences between commas count as tags, too
_PICTURE = ("name", "subset", "image_hash")  # the columns that say which picture a sample is of


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The whole content of a cache, known before anything is encoded.

    `samples` has the columns of cache/samples.py, `named_rows` the manifest's further fields: both name rows by their
    number in `rows`.
    """

    kind: Kind
    recipe_version: int
    fingerprints: Mapping[str, str]
    recipe: Mapping[str, Any]  # as the manifest shows it; the rows' own recipes make the keys
    rows: Sequence[WantedRow]
    samples: Columns
    subsets: Mapping[str, Any] = field(default_factory=dict)  # settings by name
    unreadable: Sequence[Mapping[str, Any]] = ()  # pictures: name, subset, image_hash ("" if unknown), reason
    named_rows: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by subset: how many captions have each

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each row; equal rows have equal keys."""
        rows_of_recipes = {id(row.recipe): row for row in self.rows}
        makers = {recipe: self._ingredients(row).keys_of(self.kind) for recipe, row in rows_of_recipes.items()}
        return tuple(makers[id(row.recipe)](row.source) for row in self.rows)

    @cached_property
    def row_by_key(self) -> dict[str, WantedRow]:
        return dict(zip(self.keys, self.rows, strict=True))

    @property
    def nbytes(self) -> int:
        """The size of all rows."""
        return sum(row.nbytes for row in self.row_by_key.values())

    @cached_property
    def columns(self) -> Columns:
        """The samples with the keys of their rows."""
        named = {name: [self.keys[number] for number in self.samples[name]] for name in row_columns(self.kind)}
        return {**self.samples, **named}

    @cached_property
    def extra(self) -> dict[str, str]:
        """The manifest's further fields: keys of rows."""
        return {name: self.keys[number] for name, number in self.named_rows.items()}

    @cached_property
    def identity(self) -> str:
        """The hash of all that would be published: writers of equal identity may share a folder."""
        about = [self.kind, self.recipe_version, self.fingerprints, self.recipe, self.subsets, self.extra, self.tags]
        columns = {name: list(values) for name, values in self.columns.items()}
        return hash_json([about, sorted(self.row_by_key), columns, list(self.unreadable)])

    def ingredients(self, key: str) -> Ingredients:
        """Returns what a row's key is made of."""
        return self._ingredients(self.row_by_key[key])

    def _ingredients(self, row: WantedRow) -> Ingredients:
        return Ingredients(recipe=row.recipe, recipe_version=self.recipe_version, fingerprints=self.fingerprints)

    def without(self, unreadable: Mapping[str, str]) -> "Readable":
        """Returns what remains when some rows, given with reasons, cannot be made: their pictures go as a whole."""
        if not unreadable:
            return Readable(keys=frozenset(self.keys), samples=self.columns, unreadable=_sorted(self.unreadable))
        identity = [name for name in _PICTURE if name in self.columns]
        pictures = list(zip(*(self.columns[name] for name in identity), strict=True))
        uses = [use for name in row_columns(self.kind) for use in zip(pictures, self.columns[name], strict=True)]
        bad: dict[tuple[Any, ...], list[str]] = {}
        for picture, key in uses:
            if key in unreadable:
                bad.setdefault(picture, []).append(key)
        kept, used = {key for picture, key in uses if picture not in bad}, {key for _, key in uses}
        entries = [
            {**dict(zip(identity, picture, strict=True)), "reason": unreadable[keys[0]], "keys": sorted(set(keys))}
            for picture, keys in bad.items()
        ]
        return Readable(
            keys=frozenset(key for key in self.keys if key not in unreadable and (key in kept or key not in used)),
            samples=select(self.columns, [picture not in bad for picture in pictures]),
            unreadable=_sorted([*self.unreadable, *entries]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """The rows and samples that can be published, and the pictures that cannot."""

    keys: frozenset[str]
    samples: Columns  # with keys
    unreadable: tuple[Any, ...]  # as those of Wanted


def _sorted(entries: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Returns unreadable pictures in an order that depends on nothing but them."""
    names = ("subset", "name", "image_hash", "reason")
    return tuple(sorted(map(dict, entries), key=lambda entry: tuple(str(entry.get(name, "")) for name in names)))
