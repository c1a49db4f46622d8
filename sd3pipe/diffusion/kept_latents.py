"""Latents of sample pictures, kept in files until a VAE is at hand."""

# B batch, C latent channels, h w latent pixels

from pathlib import Path

from torch import Tensor

from sd3pipe.errors import InputError
from sd3pipe.files import write_bytes
from sd3pipe.tensors.header import read_header_and_metadata
from sd3pipe.tensors.reader import read_file
from sd3pipe.tensors.writer import file_pieces

_LATENTS = "latents"
PARAMETERS = "parameters"  # the web's tools look for what a picture was drawn with under this name


def keep_latents(file: Path, latents_BChw: Tensor, *, prompt: str, parameters: str) -> None:
    """Writes unscaled latents in fp32, atomically, with what they were drawn with as metadata. Raises StorageError."""
    metadata = {"prompt": prompt, PARAMETERS: parameters}
    write_bytes(file, b"".join(file_pieces({_LATENTS: latents_BChw.float()}, metadata)))


def read_parameters(file: Path) -> str:
    """Returns what the latents of a file were drawn with, "" where it does not say. Raises InputError."""
    return read_header_and_metadata(file)[1].get(PARAMETERS, "")


def read_latents(file: Path, channels: int) -> Tensor:
    """Returns the latents [1, channels, h, w] of a file that keep_latents wrote. Raises InputError for any other."""
    try:
        latents_BChw = read_file(file)[_LATENTS]
    except (InputError, KeyError) as error:
        raise InputError(f"{file}: holds no latents ({error}): delete it and draw again") from error
    shape = latents_BChw.shape
    if len(shape) != 4 or shape[:2] != (1, channels) or not shape.numel() or not latents_BChw.is_floating_point():
        raise InputError(f"{file}: holds {list(shape)} and no latents of this VAE: delete it and draw again")
    return latents_BChw
