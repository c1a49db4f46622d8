"""Which prompts bear the trigger: the words by which captions call what is learnt."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd3pipe.data.captions import process_caption
from sd3pipe.data.dataset_file import Subset, load_dataset
from sd3pipe.data.image_dirs import read_image_dir
from sd3pipe.data.metadata import metadata_entries
from sd3pipe.file_stamps import FileStamps

_WORD = re.compile(r"[\w'-]+")
_NEARLY_ALL, _HARDLY_ANY = 0.9, 0.1  # shares of captions
_COMMON = {"a", "an", "and", "are", "as", "at", "by", "for", "in", "is", "it", "of", "on", "or", "the", "to", "with"}


def words_of(text: str) -> list[str]:
    """Returns a text's words in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def find_trigger(dataset: Path, prompts: Sequence[str], stamps: FileStamps) -> str:
    """Returns the words that nearly all captions of what is learnt have, and some prompts, but not all; "" if none.

    Words that regularisation pictures' captions have as well tell nothing, nor do words such as "the". Raises
    ParameterError for the dataset file, InputError for its folders.
    """
    subsets = load_dataset(dataset).subsets
    learnt = [words_of(caption) for subset in subsets if not subset.is_reg for caption in _captions(subset, stamps)]
    other = [words_of(caption) for subset in subsets if subset.is_reg for caption in _captions(subset, stamps)]
    frequent, elsewhere = _frequency(learnt), _frequency(other)
    asked = [set(words_of(prompt)) for prompt in prompts]
    found = [
        word
        for word in dict.fromkeys(word for caption in learnt for word in caption)
        if frequent[word] >= _NEARLY_ALL * len(learnt)
        and elsewhere[word] <= _HARDLY_ANY * len(other)
        and word not in _COMMON
        and any(word in prompt for prompt in asked)
        and not all(word in prompt for prompt in asked)
    ]
    return " ".join(found)


def bears(prompts: Sequence[str], trigger: str) -> NDArray[np.bool_]:
    """Returns which prompts have every word of the trigger."""
    wanted = set(words_of(trigger))
    return np.array([wanted <= set(words_of(prompt)) for prompt in prompts])


def without(prompt: str, trigger: str) -> str:
    """Returns a prompt without the trigger's words: a judge model does not know them."""
    wanted = set(words_of(trigger))
    kept = _WORD.sub(lambda match: "" if match[0].lower() in wanted else match[0], prompt)
    return re.sub(r"\s+([,.;]|$)", r"\1", re.sub(r"\s{2,}", " ", kept)).strip(" ,")


def _captions(subset: Subset, stamps: FileStamps) -> list[str]:
    entries = metadata_entries(subset) if subset.metadata_file else read_image_dir(subset, captions=stamps).entries
    return [
        process_caption(raw, subset.captions, random.Random(0))
        for entry in entries
        for raw in (subset.class_tokens or "" if entry.caption is None else entry.caption,)
    ]


def _frequency(captions: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(word for caption in captions for word in set(caption))
