"""Small tokenizers in the real file formats, trained on the spot from given texts.

CLIP: vocab.json and merges.txt (bytes, bytes at a word's end, merges, start, end: the order of OpenAI's).
T5: spiece.model by sentencepiece, and tokenizer.json as transformers saves it.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sd3pipe.files import make_folder, write_bytes, write_json, write_text
from sd3pipe.models.vocabularies import CLIP_END, CLIP_START, T5_SPECIAL, read_t5_vocabulary

_MERGES = 256
_PIECES = 512  # at most; sentencepiece stops earlier where the texts have fewer
_SENTINELS = 100
_WORD = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_")

SENTENCES = (
    "a photo of a cat sitting on a wooden table next to a cup of coffee",
    "a small red circle on a blue background, drawing, simple shapes",
    "a large green triangle and a yellow square, flat colours",
    "portrait of a woman in a white suit standing in front of a space shuttle",
    "a dog running through the grass at sunset, golden light, film grain",
    "a rocket on the launch pad at night, long exposure, smoke and steam",
    "black and white photograph of an old street with trees and houses",
    "a bowl of fruit: apples, oranges and grapes, oil painting, soft shadows",
    "mountains behind a lake in the morning, fog over the water, wide view",
    "close up of a flower with many petals, macro photo, shallow depth of field",
    "sks person wearing a hat, smiling, looking at the viewer, outdoors",
    "1girl, solo, long hair, blue eyes, school uniform, masterpiece, best quality",
    "the interior of a library with tall shelves, 3 chairs and a lamp (warm light)",
    "blurry, low quality, watermark, text, jpeg artifacts, out of focus",
)


def train_tokenizers(folder: Path, texts: Sequence[str] = SENTENCES) -> None:
    """Writes clip_l/, clip_g/ and t5xxl/ under `folder`; equal texts give equal files."""
    vocabulary, merges = _train_clip(texts)
    for name, pad in (("clip_l", CLIP_END), ("clip_g", "!")):
        target = make_folder(folder / name)
        write_json(target / "vocab.json", vocabulary)
        write_text(target / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
        _write_settings(target, _clip_settings(pad, vocabulary))
    target = make_folder(folder / "t5xxl")
    write_bytes(target / "spiece.model", _train_sentencepiece(texts))
    pieces = _write_unigram(target)
    _write_settings(target, _t5_settings(pieces))


def _byte_characters() -> dict[int, str]:
    """Returns the printable character that stands for each byte, in the order of OpenAI's vocabularies."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def _as_characters(word: str) -> tuple[str, ...]:
    table = _byte_characters()
    characters = [table[byte] for byte in word.encode("utf-8")]
    return (*characters[:-1], characters[-1] + "</w>")


def _train_clip(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns byte pairs as BPE does: the most frequent neighbours are merged, ties by spelling."""
    words = Counter(_as_characters(word) for text in texts for word in _WORD.findall(text.lower()))
    merges: list[tuple[str, str]] = []
    while len(merges) < _MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in words.items():
            for pair in pairwise(word):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merged(word, best): number for word, number in words.items()})
    characters = list(_byte_characters().values())
    pieces = [*characters, *(f"{character}</w>" for character in characters)]
    pieces += [left + right for left, right in merges]
    pieces += [CLIP_START, CLIP_END]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            result.append(pair[0] + pair[1])
            position += 2
        else:
            result.append(word[position])
            position += 1
    return tuple(result)


def _train_sentencepiece(texts: Iterable[str]) -> bytes:
    """Trains a unigram model with T5's settings: pad 0, end 1, unknown 2, no start, NFKC."""
    from sentencepiece import SentencePieceTrainer  # only whoever trains a tokenizer needs it

    model = io.BytesIO()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue] (the wheel adds it at run time)
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=_PIECES,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece=T5_SPECIAL[0], eos_piece=T5_SPECIAL[1], unk_piece=T5_SPECIAL[2],
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _write_unigram(folder: Path) -> int:
    """Writes tokenizer.json beside spiece.model and returns the number of pieces without sentinels."""
    vocabulary = read_t5_vocabulary(folder)
    pieces = [list(piece) for piece in vocabulary.pieces]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(_SENTINELS))]
    marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    table = base64.b64encode(vocabulary.normalizer_table).decode()
    normalizers = [
        {"type": "Precompiled", "precompiled_charsmap": table},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]
    sequence, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, piece) for number, piece in _special_pieces(len(pieces), sentinels).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": marks,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence, end],
            "pair": [sequence, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": marks,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": pieces + [[sentinel, 0.0] for sentinel in sentinels],
            "byte_fallback": False,
        },
    }
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1))
    return len(pieces)


def _special_pieces(pieces: int, sentinels: Sequence[str]) -> dict[int, str]:
    return dict(enumerate(T5_SPECIAL)) | {pieces + number: piece for number, piece in enumerate(sentinels)}


def _added_token(number: int, piece: str) -> dict[str, Any]:
    strip = piece.startswith("<extra_id_")
    flags = {"single_word": False, "lstrip": strip, "rstrip": strip, "normalized": False, "special": True}
    return {"id": number, "content": piece, **flags}


def _clip_settings(pad: str, vocabulary: dict[str, int]) -> dict[str, Any]:
    special = {vocabulary[piece]: piece for piece in (pad, CLIP_START, CLIP_END)}
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": pad,
        "added_tokens_decoder": _added_tokens_decoder(special),
    }


def _t5_settings(pieces: int) -> dict[str, Any]:
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(_SENTINELS))]
    return {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": _SENTINELS,
        "pad_token": T5_SPECIAL[0],
        "eos_token": T5_SPECIAL[1],
        "unk_token": T5_SPECIAL[2],
        "additional_special_tokens": sentinels[::-1],
        "added_tokens_decoder": _added_tokens_decoder(_special_pieces(pieces, sentinels)),
    }


def _added_tokens_decoder(special: dict[int, str]) -> dict[str, Any]:
    tokens = (_added_token(number, piece) for number, piece in sorted(special.items()))
    return {str(token.pop("id")): token for token in tokens}


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    write_json(folder / "tokenizer_config.json", settings)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {name: settings[name] for name in names if name in settings})
