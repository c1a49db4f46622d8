"""Token ids for the three text encoders. Free of torch and transformers.

A tokenizer is made from its vocabulary alone, so that equal vocabularies give equal ids. That differs from what
transformers makes of CLIP-G's own folder, which declares its pad token "!" as special and so turns every "!" of a text
into padding; Stability's reference, ComfyUI and sd-scripts do not, and neither does CLIP-L's folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from sd3pipe.errors import InputError
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.vocabularies import (
    CLIP_END,
    CLIP_START,
    T5_SPECIAL,
    VOCABULARY_KINDS,
    ClipVocabulary,
    T5Vocabulary,
    read_clip_vocabulary,
    read_t5_vocabulary,
)
from sd3pipe.words import EncoderName

_SPARE_PIECES = 256  # T5's embedding has rows for 100 sentinels and is rounded up to a multiple of 128
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Padded token ids of some texts: ids and mask are [texts, tokens]; mask is 1 up to the end token."""

    ids: numpy.ndarray
    mask: numpy.ndarray


class TextTokenizer:
    """Makes the token ids of one encoder, padded by that encoder's own rule."""

    def __init__(self, encoder: EncoderName, vocabulary: ClipVocabulary | T5Vocabulary) -> None:
        self.encoder = encoder
        if isinstance(vocabulary, ClipVocabulary):
            self.size = max(vocabulary.ids.values()) + 1
            self.end_id = vocabulary.ids[CLIP_END]
            self.pad_id = 0 if encoder == "clip_g" else self.end_id
            self._tokenizer = _clip_tokenizer(vocabulary)
        else:
            self.size, self.end_id, self.pad_id = len(vocabulary.pieces), 1, 0
            self._tokenizer = _t5_tokenizer(vocabulary)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's ids, with start and end tokens, of whatever length."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def pad(self, ids: Sequence[Sequence[int]], length: int) -> TokenBatch:
        """Pads rows of at most `length` ids to `length`."""
        padded = numpy.full((len(ids), length), self.pad_id, dtype=numpy.int64)
        mask = numpy.zeros((len(ids), length), dtype=numpy.uint8)
        for row, numbers in enumerate(ids):
            padded[row, : len(numbers)] = numbers
            mask[row, : len(numbers)] = 1
        return TokenBatch(ids=padded, mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedTexts:
    """The token ids of some texts for one encoder, cut to its maximum."""

    tokenizer: TextTokenizer
    ids: Sequence[Sequence[int]]
    counts: Sequence[int]  # tokens with start and end before cutting
    lengths: Sequence[int]  # positions after padding
    common_lengths: frozenset[int]  # of texts that are padded or cut; one between them has few others of its length

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        """Returns the padded ids of some texts, which must have one length."""
        (length,) = {self.lengths[number] for number in numbers}
        return self.tokenizer.pad([self.ids[number] for number in numbers], length)

    def is_cut(self, number: int) -> bool:
        """Returns whether a text lost tokens."""
        return self.counts[number] > len(self.ids[number])


def tokenize_texts(tokenizer: TextTokenizer, texts: Sequence[str], *, max_length: int, pad_to: int) -> TokenizedTexts:
    """Returns the ids of texts, each cut to `max_length` and meant to be padded to `pad_to` or to its own length."""
    whole, end = tokenizer.encode(texts), tokenizer.end_id
    ids = [numbers if len(numbers) <= max_length else [*numbers[: max_length - 1], end] for numbers in whole]
    return TokenizedTexts(
        tokenizer=tokenizer,
        ids=ids,
        counts=[len(numbers) for numbers in whole],
        lengths=[max(pad_to, len(numbers)) for numbers in ids],
        common_lengths=frozenset({pad_to, max_length}),
    )


def tokenize_for_encoders(
    texts: Sequence[str],
    folders: Mapping[EncoderName, Path],
    vocabularies: Mapping[EncoderName, int],
    *,
    clip_length: int,
    recipe: TextRecipe,
) -> dict[EncoderName, TokenizedTexts]:
    """Returns the texts' ids for each encoder. `vocabularies` are the numbers of rows of the encoders' embeddings.

    Raises InputError for tokenizers that belong to other encoders.
    """
    tokens: dict[EncoderName, TokenizedTexts] = {}
    for name in ENCODERS:
        tokenizer = load_tokenizer(name, folders[name])
        spare = vocabularies[name] - tokenizer.size
        if spare < 0 or spare > (_SPARE_PIECES if name == "t5xxl" else 0):
            raise InputError(
                f"{folders[name]}: this tokenizer has {tokenizer.size} tokens, the model's {name} {vocabularies[name]}"
                ": they do not belong together: pass the model's own as --tokenizers"
            )
        max_length = recipe.t5xxl_max_token_length if name == "t5xxl" else clip_length
        pad_to = recipe.t5_pad_to if name == "t5xxl" else clip_length
        tokens[name] = tokenize_texts(tokenizer, texts, max_length=max_length, pad_to=pad_to)
    return tokens


def load_tokenizer(encoder: EncoderName, folder: Path) -> TextTokenizer:
    """Makes the tokenizer of one encoder from the vocabulary in `folder`. Raises InputError."""
    if VOCABULARY_KINDS[encoder] == "clip":
        return TextTokenizer(encoder, read_clip_vocabulary(folder))
    return TextTokenizer(encoder, read_t5_vocabulary(folder))


def _clip_tokenizer(vocabulary: ClipVocabulary) -> Tokenizer:
    """Builds OpenAI's tokenizer: lower case, split by words, byte pairs that end in </w>."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=list(vocabulary.merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=CLIP_END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (CLIP_START, CLIP_END)])
    start, end = (CLIP_START, vocabulary.ids[CLIP_START]), (CLIP_END, vocabulary.ids[CLIP_END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[CLIP_START, "$A", CLIP_END], special_tokens=[start, end]
    )
    return tokenizer


def _t5_tokenizer(vocabulary: T5Vocabulary) -> Tokenizer:
    """Builds sentencepiece's unigram tokenizer: NFKC by its table, blanks as word marks, </s> at the end."""
    tokenizer = Tokenizer(models.Unigram(list(vocabulary.pieces), unk_id=2, byte_fallback=False))
    if vocabulary.normalizer_table:
        tokenizer.normalizer = normalizers.Precompiled(vocabulary.normalizer_table)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in T5_SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return tokenizer
