"""The demo base's VAE: 16 channels, 8 x smaller, trained on drawings and blobs in three phases."""

import math
from collections.abc import Callable

import numpy as np
import torch
from demo_base_shards import THREADS, Part, Shards
from demo_blobs import draw_blob
from torch import Tensor, nn

from sd3pipe.demo.drawings import all_subjects, draw
from sd3pipe.models.vae import SCALE, SHIFT, VAE
from sd3pipe.models.vae_architecture import VAEArchitecture

ARCHITECTURE = VAEArchitecture(level_widths=(32, 32, 64, 64), blocks_per_level=1)
SIZES = ((64, 64), (64, 96), (96, 64))  # height, width
SIZE_SHARES = (0.8, 0.1, 0.1)
CROP_PX, CROP_STEPS, CROP_BATCH = 32, 900, 16  # most steps see crops, which cost a quarter
WHOLE_STEPS, DECODER_STEPS, WHOLE_BATCH = 250, 700, 8
LEARNING_RATE, DECODER_LEARNING_RATE = 2e-3, 1e-3
KL_WEIGHT = 1e-3
DECODER_NOISE = 0.06  # teaches the decoder to forgive what the MMDiT gets slightly wrong
_BLOB_SHARE = 0.4  # blobs teach outlines that the grammar does not have, so that a new shape can be encoded
_PICTURES_PER_SIZE = 1000

Log = Callable[[str], None]


class Pictures:
    """Drawings and blobs of every size, made once; gives batches of whole pictures or of square crops."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self._subjects = all_subjects()
        self._pools = [
            np.stack([self._picture(height, width) for _ in range(_PICTURES_PER_SIZE)]) for height, width in SIZES
        ]

    def batch(self, size: int, crop: int | None = None) -> Tensor:
        """Returns pixels in [-1, 1], [B, 3, H, W]."""
        pool = self._pools[self.generator.choice(len(SIZES), p=SIZE_SHARES)]
        chosen = pool[self.generator.integers(len(pool), size=size)]
        if crop is not None:
            _, height, width, _ = chosen.shape
            tops = self.generator.integers(height - crop + 1, size=size)
            lefts = self.generator.integers(width - crop + 1, size=size)
            places = zip(chosen, tops, lefts, strict=True)
            chosen = np.stack([picture[top : top + crop, left : left + crop] for picture, top, left in places])
        return as_pixels(chosen)

    def _picture(self, height: int, width: int) -> np.ndarray:
        if self.generator.random() < _BLOB_SHARE:
            return draw_blob(height=height, width=width, generator=self.generator)
        subject = self._subjects[self.generator.integers(len(self._subjects))]
        return draw(subject, height=height, width=width, generator=self.generator)


def as_pixels(pictures: np.ndarray) -> Tensor:
    """Returns pixels in [-1, 1], [B, 3, H, W], of pictures [B, H, W, 3] in 0..255."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(log: Log) -> VAE:
    """Returns the trained VAE, whose latents have mean 0 and deviation 1 in the MMDiT's space."""
    torch.manual_seed(0)
    vae = VAE(ARCHITECTURE).requires_grad_(True)
    log(f"vae: {sum(parameter.numel() for parameter in vae.parameters())} parameters")
    pictures = Pictures(seed=1)
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    shards = Shards(vae, _autoencoder_loss)
    total = CROP_STEPS + WHOLE_STEPS
    for step in range(total):
        set_rate(optimizer, LEARNING_RATE, step, 1.3 * total)  # it falls further in the decoder's own phase
        in_crops = step < CROP_STEPS
        pixels = pictures.batch(CROP_BATCH if in_crops else WHOLE_BATCH, CROP_PX if in_crops else None)
        loss = shards.backward(list(zip(pixels.chunk(THREADS), _noise(pixels, generator).chunk(THREADS), strict=True)))
        _step(vae, optimizer)
        if step % 50 == 0:
            log(f"vae: step {step}, loss {loss:.4f}")
    normalise(vae, pictures)
    train_decoder(vae, pictures, generator, log)
    return vae.eval().requires_grad_(False)


def train_decoder(vae: VAE, pictures: Pictures, generator: torch.Generator, log: Log) -> None:
    """Goes on with the decoder alone, on latents with a little noise."""
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=DECODER_LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    shards = Shards(vae, _decoder_loss)
    for step in range(DECODER_STEPS):
        set_rate(optimizer, DECODER_LEARNING_RATE, step, DECODER_STEPS)
        pixels = pictures.batch(WHOLE_BATCH)
        noises = (_noise(pixels, generator), _noise(pixels, generator))
        loss = shards.backward(list(zip(*(values.chunk(THREADS) for values in (pixels, *noises)), strict=True)))
        _step(vae, optimizer)
        if step % 50 == 0:
            log(f"vae: decoder step {step}, loss {loss:.4f}")


def _autoencoder_loss(vae: nn.Module, part: Part) -> Tensor:
    assert isinstance(vae, VAE)
    pixels, noise = part
    mean, logvar = vae.encode(pixels)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return _difference(vae.decode(mean + torch.exp(0.5 * logvar) * noise), pixels) + KL_WEIGHT * kl


def _decoder_loss(vae: nn.Module, part: Part) -> Tensor:
    assert isinstance(vae, VAE)
    pixels, noise, more_noise = part
    with torch.no_grad():
        mean, logvar = vae.encode(pixels)
    return _difference(vae.decode(mean + torch.exp(0.5 * logvar) * noise + DECODER_NOISE * more_noise), pixels)


def _noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns noise of the latents' shape."""
    batch, _, height, width = pixels.shape
    return torch.randn(batch, ARCHITECTURE.latent_channels, height // 8, width // 8, generator=generator)


@torch.no_grad()
def normalise(vae: VAE, pictures: Pictures) -> None:
    """Scales each latent channel to mean 0 and deviation 1 in the MMDiT's space; the decoder's first layer undoes it.

    At the picture's edge, where that layer pads with zeros, the undoing is not exact; the decoder's own phase heals it.
    """
    means = [vae.encode(pictures.batch(16))[0].transpose(0, 1).flatten(1) for _ in range(20)]
    values = torch.cat(means, dim=1)
    gain = 1 / (values.std(dim=1) * SCALE)
    offset = SHIFT - values.mean(dim=1) * gain
    last, first, channels = vae.encoder.conv_out, vae.decoder.conv_in, len(gain)
    last.weight[:channels] *= gain.view(-1, 1, 1, 1)
    last.bias[:channels] = last.bias[:channels] * gain + offset
    last.bias[channels:] += 2 * gain.log()
    first.weight /= gain.view(1, -1, 1, 1)
    first.bias -= (first.weight.sum(dim=(2, 3)) * offset).sum(dim=1)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, total: float, warmup: int = 50) -> None:
    """Sets a learning rate that rises over `warmup` steps and falls along a cosine to a fiftieth at `total`."""
    rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _difference(output: Tensor, pixels: Tensor) -> Tensor:
    return (output - pixels).abs().mean() + 2 * (output - pixels).square().mean()


def _step(vae: VAE, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
