"""Which rows share a segment file: a pure function of the set of keys, in which one row more moves one file.

The rows of one group form a binary trie on the bits of their keys; a leaf with more than N rows splits by the next bit.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3pipe.cache.keys import FORMAT_VERSION, Kind
from sd3pipe.fingerprint import hash_json

SEGMENT_BYTES = 96 << 20  # a full leaf's bound; leaves are 70 % full on average, so files are about 64 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRow:
    """One row that the dataset needs.

    `recipe` holds the fields that can change this row's numbers. `group` names the rows that may share a segment, and
    `nbytes` is the nominal size of a row of that group: a function of the recipe alone, so that all plan alike.
    """

    source: str
    recipe: Mapping[str, Any]
    group: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One segment of the plan: its id and its rows' keys, in ascending order."""

    plan_id: str
    group: str
    nbytes: int  # nominal, of one row
    keys: tuple[str, ...]


def rows_per_segment(nbytes: int) -> int:
    """Returns N, a power of two: the most rows of a nominal size that one segment holds."""
    return 1 << max(0, (SEGMENT_BYTES // max(nbytes, 1)).bit_length() - 1)


def plan_id(kind: Kind, keys: Sequence[str]) -> str:
    """Returns the name of the segment that holds exactly the rows `keys`."""
    return hash_json({"format": FORMAT_VERSION, "kind": kind, "keys": sorted(keys)})


def plan_leaves(kind: Kind, groups: Iterable[tuple[str, str, int]]) -> list[Leaf]:
    """Returns the segments for rows given as (key, group, nominal bytes), in plan order.

    Raises ValueError if a key is in two groups or a group's rows differ in nominal size: a mistake of the caller.
    """
    members: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    group_of: dict[str, str] = {}
    for key, group, nbytes in groups:
        if sizes.setdefault(group, nbytes) != nbytes:
            raise ValueError(f"rows of group {group} have nominal sizes {sizes[group]} and {nbytes}")
        if group_of.setdefault(key, group) != group:
            raise ValueError(f"row {key} is in the groups {group_of[key]} and {group}")
        members.setdefault(group, set()).add(key)
    return [
        Leaf(plan_id=plan_id(kind, keys), group=group, nbytes=sizes[group], keys=tuple(keys))
        for group in sorted(members)
        for keys in _split(sorted(members[group]), rows_per_segment(sizes[group]))
    ]


def _split(keys: list[str], most: int, bit: int = 0) -> Iterator[list[str]]:
    """Yields the trie's leaves for sorted keys that agree in all bits before `bit`, the most significant first."""
    if len(keys) <= most:
        if keys:
            yield keys
        return
    middle = bisect_left(keys, 1, key=lambda key: int(key[bit // 4], 16) >> (3 - bit % 4) & 1)
    yield from _split(keys[:middle], most, bit + 1)
    yield from _split(keys[middle:], most, bit + 1)
