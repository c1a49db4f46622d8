"""The finished captions of a cache as a file in it, which `encode-text` reads where a dataset file says caption_cache.

A line of JSON for each picture, by the hash of its bytes: a picture keeps its caption when it is renamed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sd3pipe.captioning.wording import CountTokens, finished
from sd3pipe.data.caption_cache import CachedCaptions
from sd3pipe.data.scan import Picture
from sd3pipe.files import write_text
from sd3pipe.rules.captioning import WordingRules
from sd3pipe.stages import CAPTIONS


def finished_captions(
    pictures: Iterable[Picture], words: Mapping[str, str], rules: WordingRules, count_tokens: CountTokens | None
) -> list[tuple[Picture, str]]:
    """Returns the caption of each picture that has words, by the hash of its bytes."""
    return [
        (picture, finished(words[picture.image_hash], rules, told=told(picture), count_tokens=count_tokens))
        for picture in pictures
        if picture.image_hash in words
    ]


def with_further_lines(
    captions: Sequence[tuple[Picture, str]], others: Sequence[CachedCaptions]
) -> list[tuple[Picture, str]]:
    """Returns captions with those of other caches behind them, a line for each."""
    return [
        (picture, "\n".join(" ".join(line.split()) for line in (caption, *_of(picture, others)) if line.strip()))
        for picture, caption in captions
    ]


def _of(picture: Picture, others: Sequence[CachedCaptions]) -> list[str]:
    return [captions.get((picture.subset.name, picture.image_hash), "") for captions in others]


def told(picture: Picture) -> str:
    """Returns what the dataset file puts around a picture's caption."""
    return f"{picture.subset.captions.caption_prefix} {picture.subset.captions.caption_suffix}"


def write_list(cache: Path, captions: Sequence[tuple[Picture, str]]) -> None:
    """Writes the list of finished captions into a published cache. Raises StorageError."""
    lines = sorted({
        json.dumps({"image": picture.image_hash, "subset": picture.subset.name, "caption": caption}, ensure_ascii=False)
        for picture, caption in captions
    })  # fmt: skip
    write_text(cache / CAPTIONS, "".join(f"{line}\n" for line in lines))
