"""A dataset of texts and an encoder that needs no torch: a row's bytes are a function of its source and recipe."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe.cache.keys import text_source
from sd3pipe.cache.plan import SEGMENT_BYTES, WantedRow
from sd3pipe.cache.rows import Row, Tensor, from_numpy
from sd3pipe.cache.store import FillCounts, fill_cache
from sd3pipe.cache.wanted import Wanted
from sd3pipe.errors import UnreadablePicture

ROWS_PER_SEGMENT = 4


def fake_row(source: str, scale: float = 1.0) -> Row:
    """Returns two small tensors that depend on the source alone, one of them ragged."""
    seed = int.from_bytes(hashlib.sha256(f"{source} {scale}".encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    length = 1 + seed % 5
    return {
        "hidden": from_numpy(generator.standard_normal((length, 8), dtype=np.float32)),
        "half": Tensor("BF16", (3,), generator.integers(0, 256, 6, np.uint8).tobytes()),
        "mask": from_numpy(generator.integers(0, 2, length).astype(np.uint8)),
    }


def wanted_texts(
    captions: Mapping[str, str] | Sequence[str],
    *,
    weights: str = "w0",
    scale: float = 1.0,
    rows_per_segment: int = ROWS_PER_SEGMENT,
    **manifest: Any,
) -> Wanted:
    """Returns what a text stage would want for captions by picture name."""
    named = captions if isinstance(captions, Mapping) else {f"{text}.png": text for text in captions}
    recipe = {"scale": scale}
    nbytes = SEGMENT_BYTES // rows_per_segment
    rows = [WantedRow(source=text_source(text), recipe=recipe, group="text", nbytes=nbytes) for text in named.values()]
    names = list(named)
    samples = {
        "name": names,
        "subset": ["photos"] * len(names),
        "image_hash": [hashlib.sha256(name.encode()).hexdigest() for name in names],
        "caption_hash": [row.source for row in rows],
        "variant": [0] * len(names),
        "key": range(len(names)),
    }
    return Wanted(
        kind="text",
        recipe_version=1,
        fingerprints={"clip_l": weights},
        recipe=recipe,
        rows=rows,
        samples=samples,
        **manifest,
    )


class FakeEncoder:
    """Encodes by `fake_row`, and remembers what it was asked for."""

    def __init__(self, wanted: Wanted, unreadable: Mapping[str, str] | None = None) -> None:
        self.wanted = wanted
        self.asked: list[str] = []
        self._unreadable = {text_source(text): reason for text, reason in (unreadable or {}).items()}

    def __call__(self, keys: Sequence[str]) -> Iterator[tuple[str, Row | UnreadablePicture]]:
        for key in keys:
            self.asked.append(key)
            row = self.wanted.row_by_key[key]
            if row.source in self._unreadable:
                yield key, UnreadablePicture(self._unreadable[row.source])
            else:
                yield key, fake_row(row.source, row.recipe["scale"])


def fill(out: Path, wanted: Wanted, *, unreadable: Mapping[str, str] | None = None, **options: Any) -> FillCounts:
    """Fills a cache with the fake encoder."""
    return fill_cache(out, wanted, FakeEncoder(wanted, unreadable), made_with="fake 1", **options)


def captions(count: int, start: int = 0) -> dict[str, str]:
    """Returns `count` different captions by picture name."""
    return {f"{number:05}.png": f"picture number {number}" for number in range(start, start + count)}
