"""Token ids for the three text encoders, and where their tokenizers are looked for. Free of torch and transformers.

A tokenizer is made from its vocabulary alone, so that equal vocabularies give equal ids. That differs from what
transformers makes of CLIP-G's own folder, which declares its pad token "!" as special and so turns every "!" of a text
into padding; Stability's reference, ComfyUI and sd-scripts do not, and neither does CLIP-L's folder.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from sd3pipe.errors import InputError
from sd3pipe.fingerprint import hash_json
from sd3pipe.models.text_architecture import ENCODERS, EncoderName
from sd3pipe.models.vocabularies import (
    CLIP_END,
    CLIP_START,
    T5_SPECIAL,
    ClipVocabulary,
    T5Vocabulary,
    VocabularyKind,
    has_vocabulary,
    read_clip_vocabulary,
    read_t5_vocabulary,
    vocabulary_identity,
)
from sd3pipe.stat_memory import StatMemory

TOKENIZERS_VARIABLE = "SD3PIPE_TOKENIZERS"
HUB_REPOSITORIES: dict[EncoderName, str] = {
    "clip_l": "openai/clip-vit-large-patch14",
    "clip_g": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google/t5-v1_1-xxl",
}
VOCABULARY_KINDS: dict[EncoderName, VocabularyKind] = {"clip_l": "clip", "clip_g": "clip", "t5xxl": "t5"}

# Our own names, then those of a diffusers folder. CLIP-L and CLIP-G share one vocabulary.
_FOLDERS: dict[EncoderName, tuple[str, ...]] = {
    "clip_l": ("clip_l", "tokenizer", "clip_g", "tokenizer_2"),
    "clip_g": ("clip_g", "tokenizer_2", "clip_l", "tokenizer"),
    "t5xxl": ("t5xxl", "tokenizer_3"),
}
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

    def cut(self, ids: Sequence[int], max_length: int) -> list[int]:
        """Returns at most `max_length` ids, the last of which is the end token."""
        return list(ids) if len(ids) <= max_length else [*ids[: max_length - 1], self.end_id]

    def pad(self, ids: Sequence[Sequence[int]], length: int) -> TokenBatch:
        """Pads rows of at most `length` ids to `length`."""
        padded = numpy.full((len(ids), length), self.pad_id, dtype=numpy.int64)
        mask = numpy.zeros((len(ids), length), dtype=numpy.uint8)
        for row, numbers in enumerate(ids):
            padded[row, : len(numbers)] = numbers
            mask[row, : len(numbers)] = 1
        return TokenBatch(ids=padded, mask=mask)


def load_tokenizer(encoder: EncoderName, folder: Path) -> TextTokenizer:
    """Makes the tokenizer of one encoder from the vocabulary in `folder`. Raises InputError."""
    if VOCABULARY_KINDS[encoder] == "clip":
        return TextTokenizer(encoder, read_clip_vocabulary(folder))
    return TextTokenizer(encoder, read_t5_vocabulary(folder))


def tokenizers_identity(folders: Mapping[EncoderName, Path], memory: StatMemory | None = None) -> str:
    """Returns one hash for the three vocabularies' content, whatever files they lie in."""
    kinds = VOCABULARY_KINDS
    return hash_json({name: vocabulary_identity(folders[name], kinds[name], memory) for name in ENCODERS})


def find_tokenizers(*, folder: Path | None, beside: Sequence[Path] = ()) -> dict[EncoderName, Path]:
    """Returns the folder of each encoder's vocabulary, from the first place that has it.

    A `folder` given by hand, else the one that SD3PIPE_TOKENIZERS names, must have all; else each is looked for in the
    places `beside` the model, then in the local hub cache. Raises InputError.
    """
    named = folder or (Path(value) if (value := os.environ.get(TOKENIZERS_VARIABLE)) else None)
    if named is not None:
        found = _in_place(named)
        if missing := [name for name in ENCODERS if name not in found]:
            origin = "--tokenizers" if folder else TOKENIZERS_VARIABLE
            raise InputError(
                f"{named}: no tokenizer for {', '.join(missing)} ({origin} names a folder with clip_l/, clip_g/ and "
                f"t5xxl/): fetch them with `sd3pipe tokenizers {named}`"
            )
        return found
    found = {}
    for place in _places(beside):
        found = place | found
        if len(found) == len(ENCODERS):
            return found
    missing = ", ".join(name for name in ENCODERS if name not in found)
    raise InputError(
        f"no tokenizer for {missing} in --tokenizers, {TOKENIZERS_VARIABLE}, beside the model or in the local hub "
        "cache: fetch them with `sd3pipe tokenizers DIR`, then pass --tokenizers DIR"
    )


def places_beside(model: Path) -> list[Path]:
    """Returns the folders in which a model on this disk may have its tokenizers."""
    folder = model if model.is_dir() else model.parent
    return [folder, folder / "tokenizers"]


def _places(beside: Sequence[Path]) -> Iterator[dict[EncoderName, Path]]:
    for place in beside:
        yield _in_place(place)
    yield _in_hub_cache()


def _in_place(place: Path) -> dict[EncoderName, Path]:
    found: dict[EncoderName, Path] = {}
    for encoder in ENCODERS:
        for name in _FOLDERS[encoder]:
            if has_vocabulary(place / name, VOCABULARY_KINDS[encoder]):
                found[encoder] = place / name
                break
    return found


def _in_hub_cache() -> dict[EncoderName, Path]:
    """Looks through the local hub cache without the network: the encoders' own repositories, then SD3's."""
    from huggingface_hub import try_to_load_from_cache  # takes 0.1 s; mostly not needed

    found: dict[EncoderName, Path] = {}
    for encoder in ENCODERS:
        kind = VOCABULARY_KINDS[encoder]
        anchors = ("spiece.model", "tokenizer.json") if kind == "t5" else ("vocab.json", "tokenizer.json")
        for repository in (HUB_REPOSITORIES[encoder], HUB_REPOSITORIES["clip_l" if kind == "clip" else "t5xxl"]):
            for anchor in anchors:
                path = try_to_load_from_cache(repository, anchor)
                if isinstance(path, str) and has_vocabulary(Path(path).parent, kind):
                    found.setdefault(encoder, Path(path).parent)
    return found


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
