"""Pictures to rows of latents: batches of one size through the VAE, the next one under way while one is read back."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sd3pipe.errors import InputError
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.models.vae_strips import encode_within, usable_memory
from sd3pipe.words import LatentMode

# B batch, C channels, H W pixels, h w latent pixels


class LatentEncoder:
    """A VAE with what is fixed for a whole run. Batches always have `batch_size` rows: the last one is filled up.

    At a fixed batch size a row's bits depend on no neighbour and no place in the batch.
    """

    def __init__(self, vae: VAE, *, batch_size: int, mode: LatentMode, stored_as: torch.dtype) -> None:
        self.vae, self.batch_size, self.mode, self.stored_as = vae, batch_size, mode, stored_as
        weight = next(vae.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.memory_bytes = usable_memory(self.device, beside_others=False)

    @torch.inference_mode()
    def start(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Returns the unscaled latents of up to `batch_size` uint8 pictures [H, W, 3], still on the device.

        Moments are mean and log-variance, [B, 2 x channels, h, w].
        """
        full = [*pictures, *[pictures[-1]] * (self.batch_size - len(pictures))]
        pixels_BHWC = torch.from_numpy(np.stack(full))
        if self.device.type == "cuda":
            pixels_BHWC = pixels_BHWC.pin_memory().to(self.device, non_blocking=True)
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        pixels_BCHW.div_(127.5).sub_(1)
        mean, logvar = encode_within(self.vae, pixels_BCHW, self.memory_bytes)
        latents = mean if self.mode == "mean" else torch.cat([mean, logvar], dim=1)
        return latents[: len(pictures)]

    def finish(self, latents: Tensor, names: Sequence[str]) -> Iterator[Tensor]:
        """Yields the rows of a batch in the type they are stored as. Raises InputError if one does not fit into it."""
        rows = latents.float().cpu()
        for name, row in zip(names, rows, strict=True):
            largest = row.abs().amax().item()
            computed, stored = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.stored_as))
            if not np.isfinite(largest):
                full = self.dtype == torch.float32
                way_out = "the VAE's weights are damaged" if full else "set vae_dtype = float32"
                raise InputError(f"{name}: the VAE gives no finite numbers in {computed}: {way_out}")
            if largest > torch.finfo(self.stored_as).max:
                raise InputError(
                    f"{name}: its latents reach {largest:.3g}, beyond {stored}: set latent_dtype = float32"
                )
            yield row.to(self.stored_as)


@torch.inference_mode()
def encoder_speed(architecture: VAEArchitecture, device: torch.device, dtype: torch.dtype) -> float:
    """Returns about how many pixels per second a VAE of this shape encodes here, from one small picture."""
    with torch.device("meta"):
        vae = VAE(architecture)
    vae = vae.to_empty(device=device).to(dtype).eval()
    for parameter in vae.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    side = 256
    picture = torch.zeros(1, architecture.image_channels, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        vae.encode(picture)[0].cpu()
        seconds.append(time.perf_counter() - start)
    return side * side / min(seconds)
