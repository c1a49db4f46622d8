"""What a text or prompts cache is to hold: rows, their keys and the samples table, before anything is encoded.

Needs no torch: a run with nothing to do ends here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sd3pipe.cache.keys import Kind, text_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.samples import COLUMNS
from sd3pipe.cache.wanted import MOST_TAGS, Wanted
from sd3pipe.data.captions import processed_captions, tag_frequency
from sd3pipe.data.dataset_file import Dataset
from sd3pipe.data.prompts import WrittenPrompt
from sd3pipe.data.scan import Scan
from sd3pipe.models.text_encoder_files import TextSizes
from sd3pipe.models.text_recipe import RECIPE_VERSION, TextRecipe
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.words import EncoderName


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is to be encoded, and who uses it: a row for each of `text_by_hash`, in its order."""

    kind: Kind
    text_by_hash: Mapping[str, str]  # equal texts once; the empty one is the first
    users: Mapping[str, str]  # hash of a text -> the first picture or prompt with it, for messages
    samples: Mapping[str, list[Any]]  # columns, with the rows' numbers
    subsets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unreadable: Sequence[Mapping[str, Any]] = ()
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def encoder_files(params: EncodeTextParams) -> dict[EncoderName, Path | None]:
    """Returns the encoders' own files, which beat those in the model."""
    return {"clip_l": params.clip_l, "clip_g": params.clip_g, "t5xxl": params.t5xxl}


def text_recipe(params: EncodeTextParams) -> TextRecipe:
    """Returns what the options say about the rows' numbers."""
    return TextRecipe(
        padding=params.padding,
        apply_lg_attn_mask=params.apply_lg_attn_mask,
        apply_t5_attn_mask=params.apply_t5_attn_mask,
        t5xxl_max_token_length=params.t5xxl_max_token_length,
        t5_pad_to=params.t5_pad_to or params.t5xxl_max_token_length,
        text_dtype=params.text_dtype,
        t5xxl_base_dtype=params.t5xxl_base_dtype,
        t5xxl_row_dtype=params.t5xxl_row_dtype,
    )


def caption_texts(found: Scan, dataset: Dataset, *, variants: int, seed: int) -> Texts:
    """Returns the processed captions of a dataset's pictures."""
    texts, users = {text_source(""): ""}, {}
    samples: dict[str, list[Any]] = {name: [] for name in COLUMNS["text"]}
    numbers = {digest: number for number, digest in enumerate(texts)}
    tagged: dict[str, list[str]] = {}
    for picture in found.pictures:
        captions = processed_captions(picture, variants=variants, seed=seed)
        tagged.setdefault(picture.subset.name, []).append(captions[0].lower())
        for variant, caption in enumerate(captions):
            digest = text_source(caption)
            texts.setdefault(digest, caption)
            users.setdefault(digest, str(picture.place))
            number = numbers.setdefault(digest, len(numbers))
            values = (picture.name, picture.subset.name, picture.image_hash, digest, variant, number)
            for column, value in zip(samples.values(), values, strict=True):
                column.append(value)
    return Texts(
        kind="text",
        text_by_hash=texts,
        users=users,
        samples=samples,
        subsets={subset.name: subset.weighting() for subset in dataset.subsets},
        unreadable=[file.to_json() for file in found.unreadable],
        tags={name: dict(islice(tag_frequency(lower).items(), MOST_TAGS)) for name, lower in tagged.items()},
    )


def prompt_texts(prompts: Sequence[WrittenPrompt]) -> Texts:
    """Returns sample prompts with their negative prompts; size, seed, steps and scale are in no key."""
    texts, users = {text_source(""): ""}, {}
    for number, prompt in enumerate(prompts, start=1):
        for text in (prompt.prompt, prompt.negative_prompt):
            texts.setdefault(text_source(text), text)
            users.setdefault(text_source(text), f"prompt {number}")
    numbers = {digest: number for number, digest in enumerate(texts)}
    samples: dict[str, list[Any]] = {
        "name": [f"{number:03d}" for number in range(len(prompts))],
        "prompt": [prompt.prompt for prompt in prompts],
        "negative": [prompt.negative_prompt for prompt in prompts],
        "settings": [json.dumps(prompt.settings(), sort_keys=True) for prompt in prompts],
        "key": [numbers[text_source(prompt.prompt)] for prompt in prompts],
        "negative_key": [numbers[text_source(prompt.negative_prompt)] for prompt in prompts],
    }
    return Texts(kind="prompts", text_by_hash=texts, users=users, samples=samples)


def text_wanted(texts: Texts, sizes: TextSizes, fingerprints: Mapping[str, str], recipe: TextRecipe) -> Wanted:
    """Returns the whole content of the cache."""
    fields = recipe.fields()
    nbytes = sizes.row_bytes(recipe.t5_pad_to, recipe.text_dtype, packed=recipe.t5xxl_row_dtype)
    return Wanted(
        kind=texts.kind,
        recipe_version=RECIPE_VERSION,
        fingerprints=fingerprints,
        recipe=fields,
        rows=[WantedRow(source=digest, recipe=fields, group="text", nbytes=nbytes) for digest in texts.text_by_hash],
        samples=texts.samples,
        subsets=texts.subsets,
        unreadable=texts.unreadable,
        named_rows={"empty_caption": 0},
        tags=texts.tags,
    )
