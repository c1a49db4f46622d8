"""The demo base as a diffusers folder, for tests that draw with diffusers' own pipeline."""

from pathlib import Path

import torch

from sd3pipe.demo.base_files import MODEL
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import detect_clip, detect_t5
from sd3pipe.models.vae_architecture import detect_vae
from sd3pipe.tensors.reader import read_tensors
from support.tiny_base_architecture import TinyArchitecture
from support.tiny_diffusers import write_diffusers_folder


def write_demo_base_for_diffusers(folder: Path, tokenizers: Path) -> None:
    """Writes what StableDiffusion3Pipeline.from_pretrained reads, in fp32."""
    sources = {name: find_component(name, model=MODEL) for name in ("mmdit", "vae", "clip_l", "clip_g", "t5xxl")}
    shapes = {name: source.shapes() for name, source in sources.items()}
    architecture = TinyArchitecture(
        mmdit=detect_mmdit(shapes["mmdit"]),
        vae=detect_vae(shapes["vae"], "base"),
        clip_l=detect_clip(shapes["clip_l"], "base"),
        clip_g=detect_clip(shapes["clip_g"], "base"),
        t5xxl=detect_t5(shapes["t5xxl"], "base"),
    )
    parts = {name: read_tensors(source.tensors, dtype=torch.float32) for name, source in sources.items()}
    write_diffusers_folder(folder, architecture, parts, tokenizers)
