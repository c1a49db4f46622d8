"""Latents of sample pictures, kept in files until a VAE is at hand."""

# B batch, C latent channels, h w latent pixels

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sd3pipe.errors import InputError
from sd3pipe.files import write_bytes

_LATENTS = "latents"


def keep_latents(file: Path, latents_BChw: Tensor, *, prompt: str) -> None:
    """Writes unscaled latents in fp32, atomically, with their prompt as metadata. Raises StorageError."""
    write_bytes(file, save({_LATENTS: latents_BChw.float().cpu().contiguous()}, metadata={"prompt": prompt}))


def read_latents(file: Path) -> Tensor:
    """Returns the latents [1, C, h, w] of a file that keep_latents wrote. Raises InputError for any other."""
    try:
        return load_file(file)[_LATENTS]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file}: holds no latents ({error}): delete it and draw again") from error
