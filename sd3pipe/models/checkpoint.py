"""Loads the MMDiT and the VAE from wherever they lie, frozen, in the number format asked for."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.layouts import Component
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_architecture import detect_vae
from sd3pipe.tensors.reader import read_tensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Source = str | Path | ComponentSource  # a file, a diffusers folder, a hub id, or what find_component found


def load_mmdit(source: Source, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> MMDiT:
    """Returns the MMDiT of a source, frozen. Raises InputError, and NetworkError for a hub id that cannot be had."""
    found = as_source("mmdit", source)
    architecture = mmdit_architecture(found)
    return _filled(MMDiT(architecture, device="meta"), found, dtype, device)


def load_vae(source: Source, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Returns the VAE of a source, frozen. Raises InputError, and NetworkError for a hub id that cannot be had."""
    found = as_source("vae", source)
    architecture = detect_vae(found.shapes(), found.where)
    with torch.device("meta"):
        vae = VAE(architecture)
    return _filled(vae, found, dtype, device)


def as_source(component: Component, source: Source) -> ComponentSource:
    """Returns the source of a component, looking for it where only a place is given."""
    return source if isinstance(source, ComponentSource) else find_component(component, model=source)


def _filled(module: ModuleT, source: ComponentSource, dtype: torch.dtype, device: torch.device | str) -> ModuleT:
    """Returns a module that was built without memory, holding the tensors of the source themselves."""
    module.load_state_dict(read_tensors(source.tensors, dtype=dtype, device=device), strict=True, assign=True)
    return module.eval().requires_grad_(False)
