"""How much a dataset holds, counted from names and settings: no picture is opened."""

import functools
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.data.captions import is_random
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.folders import folder_entries
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.data.prompts import load_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Pictures of a dataset, and what they become at most: distinct texts, and rows of latents."""

    pictures: int
    texts: int  # the empty caption is one of them
    rows: int
    row_pixels: int  # of all rows, if no picture is smaller than its bucket
    resolution: tuple[int, int]


@functools.cache  # several stages ask
def read_amounts(dataset: Path, *, crop_variants: int = 1, caption_variants: int = 1) -> Amounts:
    """Returns what a dataset file describes. Raises ParameterError for the file, InputError for its folders."""
    pictures = texts = rows = pixels = 0
    largest = (0, 0)
    for subset in load_dataset(dataset).subsets:
        found = len(metadata_entries(subset) if subset.metadata_file else folder_entries(subset, with_captions=False))
        of_one = (crop_variants if subset.random_crop or subset.face_crop_aug_range else 1) * (1 + subset.flip_aug)
        texts += found * (caption_variants if is_random(subset.captions) else 1)
        size = (subset.bucketing.width, subset.bucketing.height)
        pictures, rows = pictures + found, rows + found * of_one
        pixels += found * of_one * size[0] * size[1]
        largest = max(largest, size, key=lambda size: size[0] * size[1])
    return Amounts(pictures=pictures, texts=texts + 1, rows=rows, row_pixels=pixels, resolution=largest)


read_prompts = functools.cache(load_prompts)
