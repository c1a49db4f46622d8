"""Tiny MMDiTs of all three variants with random weights everywhere, and random inputs for them."""

import functools

import torch

from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT

CONTEXT_WIDTH = 96
POOLED_WIDTH = 40


def tiny_architecture(variant: str, depth: int = 3, pos_embed_max: int = 12) -> MMDiTArchitecture:
    """Depth 3: a first block, a middle one, a last one without context MLP; dual attention in the first two."""
    return MMDiTArchitecture(
        depth=depth,
        pos_embed_max=pos_embed_max,
        pooled_width=POOLED_WIDTH,
        context_width=CONTEXT_WIDTH,
        qk_norm=variant != "sd3-medium",
        dual_attention_blocks=tuple(range((depth + 1) // 2)) if variant == "sd35-medium" else (),
    )


def random_weights(architecture: MMDiTArchitecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 tensors for every key, none of them zero or neutral. They are shared: nobody writes into them."""
    return dict(_drawn_weights(architecture, seed))


@functools.lru_cache(maxsize=2)  # to draw them takes a third of a short training run
def _drawn_weights(architecture: MMDiTArchitecture, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in architecture.shapes().items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith(("ln_q.weight", "ln_k.weight")):
            weights[key] = 1 + 0.2 * noise
        elif key.endswith("weight"):
            weights[key] = noise / noise[0].numel() ** 0.5
        else:
            weights[key] = 0.3 * noise
    return weights


def tiny_mmdit(
    variant: str, *, depth: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, pos_embed_max: int = 12
) -> MMDiT:
    """The same weights for the same seed, whatever the dtype."""
    architecture = tiny_architecture(variant, depth, pos_embed_max)
    model = MMDiT(architecture, dtype=dtype)
    model.load_state_dict(random_weights(architecture, seed))
    return model


def random_inputs(
    *, batch: int = 2, height: int = 8, width: int = 8, tokens: int = 10, seed: int = 1, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """Keyword arguments for MMDiT.forward."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "latents_BChw": draw(batch, 16, height, width),
        "timesteps_B": 1000 * torch.rand(batch, generator=generator),
        "context_BLD": draw(batch, tokens, CONTEXT_WIDTH),
        "pooled_BP": draw(batch, POOLED_WIDTH),
    }
