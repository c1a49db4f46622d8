"""The three text encoders and their tokenizers, as far as headers and file names tell. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.text_architecture import ENCODERS, detect_clip, detect_t5
from sd3pipe.models.tokenizer_folders import find_tokenizers, tokenizers_identity
from sd3pipe.words import CLIP_TOKENS, FORMAT_BYTES, SCALED_NEIGHBOURS, EncoderName, Format, RowFormat

_PUBLISHED_WIDTHS: Mapping[EncoderName, int] = {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}
_PUBLISHED_VOCABULARIES: Mapping[EncoderName, int] = {"clip_l": 49408, "clip_g": 49408, "t5xxl": 32128}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSizes:
    """What the encoders' tensors tell of a text's row and of its tokens; the defaults are the published encoders'."""

    widths: Mapping[EncoderName, int] = field(default_factory=lambda: _PUBLISHED_WIDTHS)
    vocabularies: Mapping[EncoderName, int] = field(default_factory=lambda: _PUBLISHED_VOCABULARIES)
    clip_length: int = CLIP_TOKENS

    def row_bytes(self, t5_tokens: int, text_dtype: Format, *, packed: RowFormat | None = None) -> int:
        """Returns the size of the row of a text of so many T5 tokens, its masks included."""
        clip_width, t5_width = self.widths["clip_l"] + self.widths["clip_g"], self.widths["t5xxl"]
        clips = (self.clip_length + 1) * clip_width * FORMAT_BYTES[text_dtype]
        scales = FORMAT_BYTES["bfloat16"] * t5_width // math.gcd(t5_width, SCALED_NEIGHBOURS)
        token = t5_width + scales if packed else t5_width * FORMAT_BYTES[text_dtype]
        return clips + t5_tokens * token + 2 * self.clip_length + t5_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """The weights and tokenizers that make the rows."""

    sources: Mapping[EncoderName, ComponentSource]
    tokenizers: Mapping[EncoderName, Path]
    sizes: TextSizes

    def fingerprints(self, stamps: FileStamps) -> dict[str, str]:
        """Returns what identifies the weights and the tokenizers. Raises InputError."""
        weights = {name: source.fingerprint(stamps) for name, source in self.sources.items()}
        return {**weights, "tokenizers": tokenizers_identity(self.tokenizers, stamps)}


def find_text_encoders(
    model: str | None, files: Mapping[EncoderName, Path | None], tokenizers: Path | None
) -> TextEncoders:
    """Returns where weights and tokenizers are. Raises InputError, NetworkError."""
    sources = _sources(model, files)
    sizes = _sizes(sources)
    found = find_tokenizers(folder=tokenizers, model=model, files=files.values())
    return TextEncoders(sources=sources, tokenizers=found, sizes=sizes)


def find_text_sizes(model: str | None, files: Mapping[EncoderName, Path | None]) -> TextSizes:
    """Returns the sizes alone, for which no tokenizers are needed. Raises InputError, NetworkError."""
    return _sizes(_sources(model, files))


def _sources(model: str | None, files: Mapping[EncoderName, Path | None]) -> dict[EncoderName, ComponentSource]:
    return {name: find_component(name, model=model, file=files[name]) for name in ENCODERS}


def _sizes(sources: Mapping[EncoderName, ComponentSource]) -> TextSizes:
    """Returns the sizes of three encoders. Raises InputError if they do not belong together."""
    clip_l, clip_g = (detect_clip(sources[name].shapes(), sources[name].where) for name in ("clip_l", "clip_g"))
    t5xxl = detect_t5(sources["t5xxl"].shapes(), sources["t5xxl"].where)
    if clip_l.positions != clip_g.positions or clip_l.width + clip_g.width > t5xxl.width:
        raise InputError(
            f"{sources['clip_l'].where} ({clip_l.positions} tokens, {clip_l.width} wide), {sources['clip_g'].where} "
            f"({clip_g.positions}, {clip_g.width}) and {sources['t5xxl'].where} ({t5xxl.width} wide) are not the "
            "encoders of one model: pass those that belong together"
        )
    return TextSizes(
        widths={"clip_l": clip_l.width, "clip_g": clip_g.width, "t5xxl": t5xxl.width},
        vocabularies={"clip_l": clip_l.vocabulary, "clip_g": clip_g.vocabulary, "t5xxl": t5xxl.vocabulary},
        clip_length=clip_l.positions,
    )
