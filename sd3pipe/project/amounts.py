"""How much a dataset holds, counted from names and settings: no picture is opened."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.data.captions import is_random
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.folders import read_folder
from sd3pipe.data.geometry import cut_counts
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.data.prompts import load_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Pictures of a dataset, and what they become at most: distinct texts, and rows of latents."""

    pictures: int
    texts: int  # the empty caption is one of them
    rows_by_size: Mapping[tuple[int, int], int]  # as if no picture were smaller than its subset's resolution

    @property
    def rows(self) -> int:
        return sum(self.rows_by_size.values())

    @property
    def largest_px(self) -> tuple[int, int]:
        return max(self.rows_by_size, key=math.prod)


@functools.cache  # several stages ask
def read_amounts(dataset: Path, *, crop_variants: int = 1, caption_variants: int = 1) -> Amounts:
    """Returns what a dataset file describes. Raises ParameterError for the file, InputError for its folders."""
    pictures, texts = 0, 1
    rows: Counter[tuple[int, int]] = Counter()
    for subset in load_dataset(dataset).subsets:
        found = len(metadata_entries(subset) if subset.metadata_file else read_folder(subset, captions=None).entries)
        of_one = math.prod(cut_counts(subset, crop_variants=crop_variants))
        texts += found * (caption_variants if is_random(subset.captions) else 1)
        pictures += found
        rows[subset.bucketing.width, subset.bucketing.height] += found * of_one
    return Amounts(pictures=pictures, texts=texts, rows_by_size=rows)


read_prompts = functools.cache(load_prompts)
