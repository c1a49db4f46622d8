"""The smallest architectures that have every part of the genuine ones; their heads are 64 wide, as those are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.text_architecture import ClipArchitecture, T5Architecture
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.models.tokenizers import load_tokenizer
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.words import ClipName, EncoderName, MMDiTVariant

_CLIP_WIDTHS: dict[EncoderName, int] = {"clip_l": 64, "clip_g": 128}
_CLIP_DEPTH = 3  # the hidden states come from the last layer but one
_T5_WIDTH = 256  # wider than both CLIPs together, which are zero-padded to it
_VAE_WIDTHS = (32, 64, 96, 96)  # shortcuts at the genuine places; GroupNorm wants multiples of 32
_POSITIONS = 32  # side of the position table: pictures up to 512 px


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyArchitecture:
    """The architectures of the five components, which fit each other."""

    mmdit: MMDiTArchitecture
    vae: VAEArchitecture
    clip_l: ClipArchitecture
    clip_g: ClipArchitecture
    t5xxl: T5Architecture

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Returns component -> key -> shape."""
        parts = {"mmdit": self.mmdit, "vae": self.vae, "clip_l": self.clip_l, "clip_g": self.clip_g}
        return {name: part.shapes() for name, part in parts.items()} | {"t5xxl": self.t5xxl.shapes()}


def base_architecture(*, variant: MMDiTVariant, depth: int, tokenizers: Path) -> TinyArchitecture:
    """Returns the smallest architectures of a variant that have all its parts, for these tokenizers."""
    folders = find_tokenizers(folder=tokenizers)
    sizes: dict[EncoderName, int] = {name: load_tokenizer(name, path).size for name, path in folders.items()}
    return TinyArchitecture(
        mmdit=MMDiTArchitecture(
            depth=depth,
            pos_embed_max=_POSITIONS,
            pooled_width=sum(_CLIP_WIDTHS.values()),
            context_width=_T5_WIDTH,
            qk_norm=variant != "sd3-medium",
            dual_attention_blocks=tuple(range(depth // 2)) if variant == "sd35-medium" else (),
        ),
        vae=VAEArchitecture(level_widths=_VAE_WIDTHS),
        clip_l=_clip("clip_l", sizes),
        clip_g=_clip("clip_g", sizes),
        t5xxl=T5Architecture(
            width=_T5_WIDTH,
            depth=2,
            heads=_T5_WIDTH // 64,
            mlp_width=2 * _T5_WIDTH,
            vocabulary=math.ceil((sizes["t5xxl"] + 100) / 128) * 128,  # 100 sentinels, rounded up as T5's own
            distance_buckets=32,
        ),
    )


def _clip(name: ClipName, sizes: Mapping[EncoderName, int]) -> ClipArchitecture:
    width = _CLIP_WIDTHS[name]
    return ClipArchitecture(
        width=width,
        depth=_CLIP_DEPTH,
        mlp_width=4 * width,
        vocabulary=sizes[name],
        positions=77,
        projected_width=width if name == "clip_g" else None,
    )
