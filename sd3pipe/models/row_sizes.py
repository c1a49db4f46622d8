"""What rows are made by, for who wants to know their sizes: what is here, else what the published models have."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sd3pipe.console import readable_bytes
from sd3pipe.errors import InputError
from sd3pipe.models.hub import is_hub_id
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_encoder_files import TextSizes, find_text_sizes
from sd3pipe.models.vae_architecture import VAEArchitecture, detect_vae
from sd3pipe.words import EncoderName, Format, RowFormat

log = logging.getLogger(__name__)

_MUCH_TEXT = 10e9  # bytes: some 4,000 captions of the published encoders
_SHORT = 77  # T5 tokens to which ComfyUI pads


def known_vae(model: str | None, file: Path | None) -> VAEArchitecture:
    """Returns the architecture in a VAE's header. A hub repository is not looked into: that would take the network."""
    if file is None and _is_remote(model):
        return VAEArchitecture()
    try:
        vae = find_component("vae", model=model, file=file)
        return detect_vae(vae.shapes(), vae.where)
    except InputError as error:
        log.info("the latents' size is that of the published VAE: %s", error)
        return VAEArchitecture()


def known_text_sizes(model: str | None, files: Mapping[EncoderName, Path | None]) -> TextSizes:
    """Returns the sizes in the text encoders' headers. A hub repository is not looked into."""
    if not all(files.values()) and _is_remote(model):
        return TextSizes()
    try:
        return find_text_sizes(model, files)
    except InputError as error:
        log.info("the texts' size is that of the published encoders: %s", error)
        return TextSizes()


def t5_tokens_at_most(texts: Iterable[str], *, pad_to: int, max_length: int) -> Counter[int]:
    """Returns how many texts have rows of how many T5 tokens at most, without a tokenizer.

    A token is a character of the normalised text at least; the first word's mark and the end token come on top.
    """
    lengths = (len(unicodedata.normalize("NFKC", text)) + 2 for text in texts)
    return Counter(min(max_length, max(pad_to, length)) for length in lengths)


def text_bytes(
    t5_tokens: Mapping[int, int], sizes: TextSizes, text_dtype: Format, *, packed: RowFormat | None = None
) -> int:
    """Returns the size of the rows of so many texts of each number of T5 tokens."""
    return sum(texts * sizes.row_bytes(tokens, text_dtype, packed=packed) for tokens, texts in t5_tokens.items())


def text_advice(
    t5_tokens: Mapping[int, int], sizes: TextSizes, *, text_dtype: Format, packed: RowFormat | None
) -> str | None:
    """Returns what these texts would take by more compact recipes; None where they take little or are compact."""
    size = text_bytes(t5_tokens, sizes, text_dtype)
    if packed is not None or size < _MUCH_TEXT:
        return None
    smaller = text_bytes(t5_tokens, sizes, text_dtype, packed="int8")
    advice = f'text takes {readable_bytes(size)}; t5xxl_row_dtype = "int8" makes it {readable_bytes(smaller)}'
    if min(t5_tokens) <= _SHORT:
        return advice
    smallest = sum(t5_tokens.values()) * sizes.row_bytes(_SHORT, text_dtype, packed="int8")
    return f"{advice}, and t5_pad_to = {_SHORT}, too, about {readable_bytes(smallest)} (docs/memory.md)"


def _is_remote(model: str | None) -> bool:
    return model is not None and is_hub_id(model) and not Path(model).expanduser().exists()
