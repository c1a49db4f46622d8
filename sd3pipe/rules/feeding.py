"""What is left out of a sample, and where it lies in the position table."""

from dataclasses import dataclass

from sd3pipe.rules.declaring import rule
from sd3pipe.words import VerifyReads

# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDropout:
    """How often a whole text encoder is replaced by zeros."""

    clip_l_dropout_rate: float = rule(0.0, "Share of samples trained without CLIP-L.", advanced=True, ge=0, le=1)
    clip_g_dropout_rate: float = rule(0.0, "Share of samples trained without CLIP-G.", advanced=True, ge=0, le=1)
    t5_dropout_rate: float = rule(0.0, "Share of samples trained without T5.", advanced=True, ge=0, le=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionRules:
    """Which codes of the position table a picture gets."""

    pos_emb_random_crop_rate: float = rule(
        0.0, "Share of samples trained at a random place of the position table.", advanced=True, ge=0, le=1
    )
    enable_scaled_pos_embed: bool = rule(
        False, "Stretch position codes to each resolution; inference programs do not.", advanced=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingRules:
    """How rows and weights are read."""

    max_data_loader_n_workers: int | None = rule(
        None, "Processes that read caches ahead, at most one a core; default: 2 with CUDA, none on the CPU.",
        advanced=True, ge=0,
    )
    verify_reads: VerifyReads = rule("first", "When a row's digest is checked.", advanced=True)
    verify_weights: bool = rule(
        False, "Hash the base model again instead of remembering its hash.", advanced=True
    )
