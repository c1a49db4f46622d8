"""How many tokens captions have, and what the encoders read of them."""

from collections.abc import Sequence
from pathlib import Path

from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.models.tokenizers import load_tokenizer
from sd3pipe.previewing.cards import CaptionTokens
from sd3pipe.words import CLIP_TOKENS, EncoderName

_ENCODERS: dict[str, EncoderName] = {"CLIP": "clip_l", "T5": "t5xxl"}  # CLIP-G counts as CLIP-L does


def token_counts(
    captions: Sequence[str], *, tokenizers: Path | None, model: str | None, t5_tokens: int
) -> dict[str, CaptionTokens]:
    """Returns the tokens of each caption. Raises InputError where there are no tokenizers."""
    folders = find_tokenizers(folder=tokenizers, model=model, files=())
    limits = {"CLIP": CLIP_TOKENS, "T5": t5_tokens}
    counts = {
        title: [len(ids) for ids in load_tokenizer(encoder, folders[encoder]).encode(captions)]
        for title, encoder in _ENCODERS.items()
    }
    return {
        caption: CaptionTokens(limits=limits, counts={title: counts[title][number] for title in counts})
        for number, caption in enumerate(captions)
    }
