"""The whole caption pipeline of sd-scripts, run before encoding and repeatable.

What is random ({wildcards}, tag order, dropped tags) is a function of (seed, picture, variant), so `variants` rows per
picture stand for the draws that sd-scripts makes anew at every access; several lines take turns in them. Dropping whole
captions is no part of this: it is a weight of the subset, and the empty caption is a row of its own.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3pipe.data.dataset_file import CaptionRules
from sd3pipe.data.scan import Picture
from sd3pipe.fingerprint import hash_json

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_UNUSED = random.Random(0)  # where nothing is drawn; to seed one for each caption takes longer than all else


def processed_captions(picture: Picture, *, variants: int, seed: int) -> tuple[str, ...]:
    """Returns the captions to encode for a picture: `variants` of them, or one where nothing is random.

    Equal pictures get equal captions from equal text, wherever they lie.
    """
    rules = picture.subset.captions
    if not is_random(rules):
        return (process_caption(picture.caption, rules, _UNUSED),)
    first_line = _number(seed, picture.image_hash)
    drawn = tuple(
        process_caption(
            picture.caption, rules, random.Random(_number(seed, picture.image_hash, n)), line=first_line + n
        )
        for n in range(variants)
    )
    return drawn[:1] if len(set(drawn)) == 1 else drawn


def is_random(rules: CaptionRules) -> bool:
    """Returns whether one raw text becomes several captions."""
    return rules.enable_wildcard or rules.shuffle_caption or rules.caption_tag_dropout_rate > 0


def process_caption(text: str, rules: CaptionRules, rng: random.Random, *, line: int = 0) -> str:
    """Returns one caption from the raw text of a caption file; of its lines the one with this number, going round.

    Order: line, prefix and suffix, wildcards, tags (fixed ones stay in place, the others are shuffled, then dropped),
    secondary separator. Two holes of sd-scripts are closed: prefix and suffix reach every line that enable_wildcard may
    choose, and keep_tokens_separator never stays in the text.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()] or [""]
    caption = lines[line % len(lines) if rules.enable_wildcard else 0]
    caption = f"{rules.caption_prefix} {caption}" if rules.caption_prefix else caption
    caption = f"{caption} {rules.caption_suffix}" if rules.caption_suffix else caption
    if rules.enable_wildcard:
        caption = _wildcards(caption, rng)
    marked = bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in caption
    if marked or rules.shuffle_caption or rules.caption_tag_dropout_rate > 0:
        head, free, tail = _split(caption, rules)
        if rules.shuffle_caption:
            free = _shuffled(free, rng)
        if rules.caption_tag_dropout_rate > 0:
            free = [tag for tag in free if rng.random() >= rules.caption_tag_dropout_rate]
        caption = _joiner(rules).join([*head, *free, *tail])
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption.strip()


def tag_frequency(captions: Iterable[str]) -> Mapping[str, int]:
    """Returns how many captions hold each tag, most frequent first, ties in alphabetical order."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update({tag.strip() for tag in caption.split(",") if tag.strip()})
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def caption_statistics(captions: Sequence[str]) -> dict[str, Any]:
    """Returns what a report says about the captions of all pictures and variants, as JSON types."""
    words = sorted(len(caption.split()) for caption in captions)
    return {
        "captions": len(captions),
        "different": len(set(captions)),
        "empty": sum(not caption for caption in captions),
        "words_median": words[len(words) // 2] if words else 0,
        "words_most": words[-1] if words else 0,
        "most_frequent": dict(list(tag_frequency(captions).items())[:10]),
    }


def _number(*about: object) -> int:
    """Returns a number that depends on all of this; of a generator that begins with it only random() is used.

    That is the one method that Python keeps stable.
    """
    return int(hash_json(list(about))[:16], 16)


def _wildcards(caption: str, rng: random.Random) -> str:
    """Replaces each {a|b|c} by one of its options; {{ and }} stand for braces, options do not nest."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        options = match[1].split("|")
        return options[int(rng.random() * len(options))]

    return _WILDCARD.sub(replacement, caption)


def _split(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Returns the tags that stay in front, those that may move or go, and those that stay at the end."""
    mark = rules.keep_tokens_separator
    if mark and mark in caption:
        head, free, *rest = caption.split(mark, 2)
        tail = _joiner(rules).join(rest).replace(mark, rules.caption_separator)
        return _tag_list(head, rules), _tag_list(free, rules), _tag_list(tail, rules)
    tags = _tag_list(caption, rules)
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def _joiner(rules: CaptionRules) -> str:
    """Returns what stands between tags: caption_separator and a blank; sd-scripts has ", " whatever that is."""
    separator = rules.caption_separator or ","
    return separator if separator[-1].isspace() else f"{separator} "


def _tag_list(text: str, rules: CaptionRules) -> list[str]:
    parts = text.split(rules.caption_separator) if rules.caption_separator else [text]
    return [tag.strip() for tag in parts if tag.strip()]


def _shuffled(tags: list[str], rng: random.Random) -> list[str]:
    """Returns the tags in random order (Fisher-Yates)."""
    tags = list(tags)
    for last in range(len(tags) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        tags[last], tags[other] = tags[other], tags[last]
    return tags
