"""What is drawn with in tests: a tiny base with encoded prompts, and runs whose checkpoints are random adapters."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sd3pipe.adapters.files import save_adapter
from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.commands import encode_text
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.params.encode_text import EncodeTextParams
from support.tiny_base import write_tiny_base


def write_base_and_prompts(folder: Path, prompts: str, *, cache: str) -> Path:
    """Writes base.safetensors and prompts.txt, and fills a cache of the prompts; returns the base."""
    base = write_tiny_base(folder / "base")
    model = base.model.rename(folder / "base.safetensors")
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    encode_text.main(
        EncodeTextParams(
            model=str(model), tokenizers=base.tokenizers, sample_prompts=folder / "prompts.txt", out=folder / cache,
            t5xxl_max_token_length=8,
        )
    )  # fmt: skip
    return model


def write_random_checkpoints(run: Path, model: Path, steps: Sequence[int]) -> None:
    """Writes the adapter of each step, every number of it random."""
    network = attach(load_mmdit(model), AdapterSpec(rank=2, seed=0))
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_adapter(run / f"checkpoints/step-{step:08d}/adapter.safetensors", network.deltas())
