"""What a preview shows: a card per picture, a section per bucket. Plain data, drawn by sheet.py."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from sd3pipe.console import count

CARD_PX = 240  # the longer side of a cut as it is drawn

Box = tuple[float, float, float, float]  # left, top, width, height as shares of the drawn picture
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTokens:
    """How many tokens a caption has, by encoder, and how many of them each encoder reads at the most."""

    limits: Mapping[str, int]
    counts: Mapping[str, int]

    @property
    def shown(self) -> str:
        return ", ".join(f"{name} {count} of {self.limits[name]}" for name, count in self.counts.items()) + " tokens"

    @property
    def cut_off(self) -> str:
        """What is left out, in words; empty where everything is read."""
        long = {name: count for name, count in self.counts.items() if count > self.limits[name]}
        return "; ".join(f"{name} reads {self.limits[name]} of {count} tokens" for name, count in long.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One picture: the drawn part of it as uint8 [height, width, 3], the loss mask over it, and the cuts in it."""

    name: str
    picture: np.ndarray
    mask: np.ndarray | None = None
    cuts: tuple[Box, ...] = ()
    facts: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    suggested: Mapping[str, str] = field(default_factory=dict)  # by whose caption it is
    warnings: tuple[str, ...] = ()

    @property
    def variants(self) -> Counter[str]:
        """The different captions in the order of the first of each, with how often each is there."""
        return Counter(self.captions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One bucket, width x height in pixels."""

    width: int
    height: int
    pictures: int
    rows: int
    cards: tuple[Card, ...]

    @property
    def title(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def file_name(self) -> str:
        return f"{self.width}x{self.height}.png"

    @property
    def counts(self) -> str:
        shown = "" if len(self.cards) >= self.pictures else f", {len(self.cards)} of them shown"
        return f"{count(self.pictures, 'picture')}{shown}; {count(self.rows, 'row')} in the cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    title: str
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()  # name, reason
    held_out: int = 0  # pictures of the validation
    tags: dict[str, dict[str, int]] = field(default_factory=dict)  # subset -> tag -> captions

    @property
    def counts(self) -> str:
        pictures = sum(section.pictures for section in self.sections)
        left_out = f", {len(self.unreadable)} left out" if self.unreadable else ""
        held_out = f", {self.held_out} held out for validation" if self.held_out else ""
        return f"{count(pictures, 'picture')} in {count(len(self.sections), 'bucket')}{left_out}{held_out}"


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """Returns at most `most` items, evenly spread over all of them."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]
