"""A tiny base model in the genuine SD3 / SD3.5 layout, with random weights in all five components, made on the spot.

Everything that a public checkpoint has is here at a small size: prefixes, stray and duplicate keys, dual attention,
qk norm, a CLIP-L without projection, fp8 with and without scales, a sharded T5, tokenizers in their own file formats.
So tests run through the code that the 8 B model runs through.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3pipe.files import make_folder
from sd3pipe.fingerprint import digest_bytes
from sd3pipe.words import MMDiTVariant
from support.tiny_base_architecture import TinyArchitecture, base_architecture
from support.tiny_diffusers import write_diffusers_folder
from support.tiny_tokenizers import train_tokenizers

Layout = Literal["single", "separate", "diffusers"]
T5Storage = Literal["fp16", "fp8", "fp8_scaled"]
Tensors = dict[str, Tensor]

_FP8_RANGE = 448.0  # largest finite float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBase:
    """Where the parts of a tiny base lie; a component file is None where the model holds the component itself."""

    folder: Path
    model: Path
    clip_l: Path | None
    clip_g: Path | None
    t5xxl: Path | None
    tokenizers: Path
    architecture: TinyArchitecture

    def encoder_options(self) -> list[str]:
        """Returns the command line options that name the text encoders' files and the tokenizers."""
        files = {"--clip-l": self.clip_l, "--clip-g": self.clip_g, "--t5xxl": self.t5xxl}
        named = [text for option, file in files.items() if file is not None for text in (option, str(file))]
        return [*named, "--tokenizers", str(self.tokenizers)]


def write_tiny_base(
    folder: Path,
    *,
    variant: MMDiTVariant = "sd35-medium",
    layout: Layout = "single",
    seed: int = 0,
    depth: int = 2,
    t5_storage: T5Storage = "fp16",
    tokenizers: Path | None = None,
) -> TinyBase:
    """Writes a random tiny base model under `folder`; equal arguments give equal files.

    The MMDiT has `depth` blocks and so a width of 64 x depth. `t5_storage` is how T5 is stored in the layouts "single"
    and "separate". With `tokenizers` (a folder with clip_l/, clip_g/, t5xxl/) those are used, and the encoders get
    their vocabularies' sizes; else small ones are trained. Raises StorageError.
    """
    make_folder(folder)
    if tokenizers is None:
        tokenizers = folder / "tokenizers"
        train_tokenizers(tokenizers)
    architecture = base_architecture(variant=variant, depth=depth, tokenizers=tokenizers)
    parts = random_components(architecture, seed)
    files: dict[str, Path] = {}
    if layout == "diffusers":
        model = folder / "diffusers"
        write_diffusers_folder(model, architecture, parts, tokenizers)
    elif layout == "single":
        model = folder / f"{variant}_incl_clips_t5xxl{t5_storage}.safetensors"
        _save(model, _single_file(parts, t5_storage))
    else:
        model = folder / f"{variant}.safetensors"
        _save(model, _prefixed(parts, ("mmdit", "vae")))
        files = _write_encoder_files(folder, parts, t5_storage)
    return TinyBase(
        folder=folder,
        model=model,
        clip_l=files.get("clip_l"),
        clip_g=files.get("clip_g"),
        t5xxl=files.get("t5xxl"),
        tokenizers=tokenizers,
        architecture=architecture,
    )


def random_components(architecture: TinyArchitecture, seed: int) -> dict[str, Tensors]:
    """Returns component -> key -> random float16 tensor; a tensor depends on seed, component, key and shape alone."""
    return {
        component: {key: _random_tensor(f"{seed}/{component}/{key}", key, shape) for key, shape in shapes.items()}
        for component, shapes in architecture.shapes().items()
    }


def _random_tensor(name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(digest_bytes(f"{name}{list(shape)}".encode())[:16], "little")
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(_offset(key, shape) + _scale(key, shape) * values).to(torch.float16)


def _offset(key: str, shape: tuple[int, ...]) -> float:
    return 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0  # norms


def _scale(key: str, shape: tuple[int, ...]) -> float:
    """Returns a standard deviation that keeps activations near one, as in a trained model."""
    if len(shape) == 1:
        return 0.1
    if "embed_tokens" in key or "shared" in key or "token_embedding" in key:
        return 1.0
    if "position_embedding" in key or "pos_embed" in key or "relative_attention_bias" in key:
        return 0.5
    fan_in = math.prod(shape[1:])
    if "SelfAttention.q" in key:
        fan_in *= 64  # T5 does not scale its attention scores; the initial weights do
    return fan_in**-0.5


def _single_file(parts: Mapping[str, Tensors], t5_storage: T5Storage) -> Tensors:
    tensors = _prefixed(parts, ("mmdit", "vae"))
    for name in ("clip_l", "clip_g"):
        tensors |= {f"text_encoders.{name}.transformer.{key}": value for key, value in parts[name].items()}
    t5 = _stored_t5(parts["t5xxl"], t5_storage)
    return tensors | {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}


def _prefixed(parts: Mapping[str, Tensors], names: tuple[str, ...]) -> Tensors:
    prefixes = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model."}
    return {prefixes[name] + key: value for name in names for key, value in parts[name].items()}


def _write_encoder_files(folder: Path, parts: Mapping[str, Tensors], t5_storage: T5Storage) -> dict[str, Path]:
    """Writes the three encoder files under their public names, with the keys that public files have too many."""
    positions = {"text_model.embeddings.position_ids": torch.arange(77).reshape(1, 77)}
    stray = {"clip_l": positions, "clip_g": {"logit_scale": torch.tensor(4.6, dtype=torch.float16)}}
    files: dict[str, Path] = {}
    for name in ("clip_l", "clip_g"):
        files[name] = folder / f"{name}.safetensors"
        _save(files[name], parts[name] | stray[name])
    names = {"fp16": "t5xxl_fp16", "fp8": "t5xxl_fp8_e4m3fn", "fp8_scaled": "t5xxl_fp8_e4m3fn_scaled"}
    files["t5xxl"] = folder / f"{names[t5_storage]}.safetensors"
    t5 = _stored_t5(parts["t5xxl"], t5_storage)
    _save(files["t5xxl"], t5 | {"encoder.embed_tokens.weight": t5["shared.weight"].clone()})
    return files


def _stored_t5(tensors: Tensors, storage: T5Storage) -> Tensors:
    """Returns T5 as the public files store it: 16 bit; every tensor cast to fp8; or linear weights fp8 with a scale."""
    if storage == "fp16":
        return tensors
    if storage == "fp8":
        return {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    stored: Tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, value in tensors.items():
        if ("SelfAttention" in key or "DenseReluDense" in key) and "relative_attention_bias" not in key:
            scale = value.abs().max().float() / _FP8_RANGE
            stored[key.removesuffix("weight") + "scale_weight"] = scale
            value = (value.float() / scale).to(torch.float8_e4m3fn)
        stored[key] = value
    return stored


def _save(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
