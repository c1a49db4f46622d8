"""Draws many prompts with the demo base and an adapter at once, and counts what the measure reads off the pictures."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.commands import encode_text
from sd3pipe.demo.base_files import MODEL, T5_LENGTH, TOKENIZERS
from sd3pipe.demo.drawings import Subject
from sd3pipe.demo.measure import Reading, read_picture
from sd3pipe.demo.project import prompt_line
from sd3pipe.diffusion.prompts import SamplePrompt, read_prompts
from sd3pipe.diffusion.sampler import DEFAULTS, TextCondition, decode_pictures, sample_latents
from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.params.encode_text import EncodeTextParams

FIELDS = ("shape", "colour", "size", "background")
_BATCH = 16


def encode_subjects(folder: Path, subjects: Sequence[Subject], first_seed: int, **options) -> list[SamplePrompt]:
    """Returns the prompts of subjects, each with a seed of its own, through the program that encodes prompts."""
    lines = [prompt_line(subject, seed) for seed, subject in enumerate(subjects, first_seed)]
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    encode_text.main(
        EncodeTextParams(
            model=str(MODEL), tokenizers=TOKENIZERS, sample_prompts=folder / "prompts.txt", out=folder / "prompts",
            threads=1, **{"t5xxl_max_token_length": T5_LENGTH, **options},
        )
    )  # fmt: skip
    return read_prompts(folder / "prompts")


@contextmanager
def model_with(adapter: Path | None) -> Iterator[torch.nn.Module]:
    """The demo base, with an adapter file attached."""
    mmdit = load_mmdit(MODEL)
    if adapter is not None:
        attach_deltas(mmdit, read_adapter(adapter).model_part).eval()
    yield mmdit


def draw_latents(prompts: Sequence[SamplePrompt], adapter: Path | None = None) -> torch.Tensor:
    """Returns the latents of all prompts, which have one size and one number of steps."""
    defaults = DEFAULTS["sd35-medium"]
    drawn = []
    with model_with(adapter) as mmdit:
        for start in range(0, len(prompts), _BATCH):
            part = prompts[start : start + _BATCH]
            drawn.append(
                sample_latents(
                    mmdit,
                    TextCondition(
                        context=torch.cat([prompt.text.context for prompt in part]),
                        pooled=torch.cat([prompt.text.pooled for prompt in part]),
                    ),
                    part[0].negative,
                    noise_BChw=torch.cat([prompt.noise(mmdit.architecture) for prompt in part]),
                    settings=part[0].settings(defaults),
                )
            )
    return torch.cat(drawn)


def read_latents(latents: torch.Tensor) -> list[Reading]:
    """Returns what the measure reads off the decoded pictures."""
    vae = load_vae(MODEL)
    return [read_picture(picture) for part in latents.split(_BATCH) for picture in decode_pictures(vae, part).numpy()]


def accuracy(subjects: Sequence[Subject], readings: Sequence[Reading]) -> dict[str, float]:
    """Returns the share of right readings of each field."""
    pairs = list(zip(subjects, readings, strict=True))
    return {field: sum(getattr(s, field) == getattr(r, field) for s, r in pairs) / len(pairs) for field in FIELDS}


def held_out_subjects() -> list[Subject]:
    """The subjects whose captions no training step has seen, as the script that makes the base splits them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    from demo_base_mmdit import split_subjects

    return split_subjects()[1]
