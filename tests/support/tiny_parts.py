"""Random tensors of tiny MMDiTs, VAEs and text encoders under canonical keys, and the files that hold them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd3pipe.models.text_architecture import ClipArchitecture, T5Architecture
from sd3pipe.models.vae_architecture import VAEArchitecture
from support.tiny_mmdit import tiny_architecture

Tensors = dict[str, torch.Tensor]

PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
TINY_VAE = VAEArchitecture(level_widths=(32, 64, 64, 96))  # widths that change and widths that stay
TINY_CLIP_L = ClipArchitecture(width=64, depth=2, mlp_width=128, vocabulary=50, positions=77, projected_width=None)
TINY_CLIP_G = ClipArchitecture(width=128, depth=2, mlp_width=256, vocabulary=50, positions=77, projected_width=128)
TINY_T5 = T5Architecture(width=64, depth=2, heads=1, mlp_width=96, vocabulary=60, distance_buckets=32)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> Tensors:
    """Tensors for every key, scaled so that a network of them keeps its activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            noise = noise / noise[0].numel() ** 0.5
        elif key.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.3 * noise
        tensors[key] = noise.to(dtype)
    return tensors


def tiny_parts(variant: str = "sd35-medium", seed: int = 0) -> dict[str, Tensors]:
    """All five components by canonical key, in the number formats of the public files."""
    return {
        "mmdit": random_tensors(tiny_architecture(variant).shapes(), torch.bfloat16, seed),
        "vae": random_tensors(TINY_VAE.shapes(), torch.bfloat16, seed + 1),
        "clip_l": random_tensors(TINY_CLIP_L.shapes(), torch.float16, seed + 2),
        "clip_g": random_tensors(TINY_CLIP_G.shapes(), torch.float16, seed + 3),
        "t5xxl": random_tensors(TINY_T5.shapes(), torch.float16, seed + 4),
    }


def save_single_file(path: Path, parts: Mapping[str, Tensors]) -> Path:
    """Writes components into one checkpoint, each behind its prefix."""
    save_file({PREFIXES[name] + key: tensor for name, part in parts.items() for key, tensor in part.items()}, path)
    return path


def save_part(path: Path, tensors: Tensors, prefix: str = "") -> Path:
    """Writes one component into a file of its own."""
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)
    return path
