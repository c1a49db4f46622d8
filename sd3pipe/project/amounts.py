"""How much a dataset holds, counted from names, captions and settings: no picture is opened."""

import functools
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.data.captions import is_random, process_caption
from sd3pipe.data.dataset_file import Subset, load_dataset
from sd3pipe.data.folders import FoundFile
from sd3pipe.data.geometry import cut_counts
from sd3pipe.data.image_dirs import read_image_dir
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.data.prompts import load_prompts
from sd3pipe.file_stamps import FileStamps


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Pictures of a dataset, and the rows of latents that they become at most."""

    pictures: int
    rows_by_size: Mapping[tuple[int, int], int]  # as if no picture were smaller than its subset's resolution

    @property
    def rows(self) -> int:
        return sum(self.rows_by_size.values())

    @property
    def largest_px(self) -> tuple[int, int]:
        return max(self.rows_by_size, key=math.prod)


@functools.cache  # several stages ask
def read_amounts(dataset: Path, *, crop_variants: int = 1) -> Amounts:
    """Returns what a dataset file describes. Raises ParameterError for the file, InputError for its folders."""
    pictures = 0
    rows: Counter[tuple[int, int]] = Counter()
    for subset in load_dataset(dataset).subsets:
        found = len(_entries(subset, captions=None))
        of_one = math.prod(cut_counts(subset, crop_variants=crop_variants))
        pictures += found
        rows[subset.bucketing.width, subset.bucketing.height] += found * of_one
    return Amounts(pictures=pictures, rows_by_size=rows)


def known_texts(dataset: Path, *, caption_variants: int, stamps: FileStamps) -> tuple[set[str], int]:
    """Returns the different texts that captions become, the empty one among them, and how many more are drawn at most.

    Raises ParameterError for the file, InputError for its folders and captions.
    """
    texts, unknown = {""}, 0
    for subset in load_dataset(dataset).subsets:
        rules = subset.captions
        for entry in _entries(subset, captions=stamps):
            if is_random(rules):
                unknown += caption_variants
            elif entry.caption is None and subset.caption_cache is not None:
                unknown += 1
            else:
                text = entry.caption if entry.caption is not None else subset.class_tokens or ""
                texts.add(process_caption(text, rules, random.Random(0)))
    return texts, unknown


def _entries(subset: Subset, captions: FileStamps | None) -> list[FoundFile]:
    return metadata_entries(subset) if subset.metadata_file else read_image_dir(subset, captions).entries


read_prompts = functools.cache(load_prompts)
