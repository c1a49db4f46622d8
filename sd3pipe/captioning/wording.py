"""What becomes of a model's words: each rule a small function from text to text, in one fixed order."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sd3pipe.data.caption_cache import CachedCaptions
from sd3pipe.data.scan import Picture
from sd3pipe.files import write_text
from sd3pipe.rules.captioning import WordingRules
from sd3pipe.stages import CAPTIONS

CountTokens = Callable[[Sequence[str]], list[int]]  # takes texts, returns the number of T5 tokens of each

_UNDERSCORE = re.compile(r"(?<=[A-Za-z0-9)])_(?=[A-Za-z0-9(])")  # not those of ^_^ and other faces
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def finished(text: str, rules: WordingRules, *, told: str = "", count_tokens: CountTokens | None = None) -> str:
    """Returns the caption that a model's words become.

    `told` is what the dataset file puts around every caption: a trigger that stands there is not added again.
    `count_tokens` is needed where `rules` bound the length.
    """
    *_, (_, caption) = steps(text, rules, told=told, count_tokens=count_tokens)
    return caption


def steps(
    text: str, rules: WordingRules, *, told: str = "", count_tokens: CountTokens | None = None
) -> Iterator[tuple[str, str]]:
    """Yields the model's own words and the text after each rule that changes it, with the rule's name."""
    caption = " ".join(text.split())
    yield "captioner", caption
    for name, rule in _rules(rules, told, count_tokens):
        changed = rule(caption)
        if changed != caption:
            caption = changed
            yield name, caption


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
    found = []
    for picture, caption in captions:
        lines = [caption, *(its.get((picture.subset.name, picture.image_hash), "") for its in others)]
        found.append((picture, "\n".join(" ".join(line.split()) for line in lines if line.strip())))
    return found


def told(picture: Picture) -> str:
    """Returns what the dataset file puts around a picture's caption."""
    return f"{picture.subset.captions.caption_prefix} {picture.subset.captions.caption_suffix}"


def write_list(cache: Path, captions: Sequence[tuple[Picture, str]]) -> None:
    """Writes finished captions into a published cache, for `encode-text` where a dataset file says caption_cache.

    A line of JSON for each picture, by the hash of its bytes: a picture keeps its caption when it is renamed. Raises
    StorageError.
    """
    lines = sorted({
        json.dumps({"image": picture.image_hash, "subset": picture.subset.name, "caption": caption}, ensure_ascii=False)
        for picture, caption in captions
    })  # fmt: skip
    write_text(cache / CAPTIONS, "".join(f"{line}\n" for line in lines))


def _rules(
    rules: WordingRules, told: str, count_tokens: CountTokens | None
) -> Iterator[tuple[str, Callable[[str], str]]]:
    if not rules.keep_underscores:
        yield "underscores", lambda text: _UNDERSCORE.sub(" ", text)
    for words in rules.drop:
        yield f"drop {words}", lambda text, words=words: _tidy(_whole(words).sub("", text))
    for pair in rules.replace:
        old, _, new = pair.partition("=")
        yield f"replace {pair}", lambda text, old=old, new=new: _tidy(_whole(old).sub(lambda _: new.strip(), text))
    if rules.trigger is not None and not _whole(rules.trigger).search(told):
        yield "trigger", lambda text: _with_trigger(text, rules.trigger or "", rules.class_word)
    if rules.most_t5_tokens is not None and count_tokens is not None:
        yield "length", lambda text: _cut(text, rules, count_tokens)
    yield "prefix", lambda text: f"{rules.prefix} {text}".strip() if rules.prefix else text
    yield "suffix", lambda text: f"{text} {rules.suffix}".strip() if rules.suffix else text


def _whole(words: str) -> re.Pattern[str]:
    """Returns a pattern for words that stand as words, in any case."""
    return re.compile(rf"(?<!\w){re.escape(words.strip())}(?!\w)", re.IGNORECASE)


def _tidy(text: str) -> str:
    """Returns a text without the commas and blanks that something taken out leaves behind."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"([,;:])(\s*[,;:])+", r"\1", text)
    return text.strip(" ,;:")


def _with_trigger(text: str, trigger: str, class_word: str | None) -> str:
    if _whole(trigger).search(text):
        return text
    if class_word is not None and _whole(class_word).search(text):
        return _whole(class_word).sub(lambda _: trigger, text)
    return f"{trigger}, {text}" if text else trigger


def _cut(text: str, rules: WordingRules, count_tokens: CountTokens) -> str:
    """Returns the longest beginning that ends with a sentence, else with a tag, else with a word, and is short enough.

    What prefix and suffix take counts, too.
    """
    assert rules.most_t5_tokens is not None
    for pieces, glue in ((_SENTENCE_END.split(text), " "), (text.split(", "), ", "), (text.split(), " ")):
        beginnings = [glue.join(pieces[:number]) for number in range(len(pieces), 0, -1)]
        counts = count_tokens([f"{rules.prefix} {beginning} {rules.suffix}".strip() for beginning in beginnings])
        for beginning, tokens in zip(beginnings, counts, strict=True):
            if tokens <= rules.most_t5_tokens:
                return beginning
    return text.split()[0] if text.split() else text
