"""The 16-channel VAE of SD3 in the checkpoint's own keys. Latents here are unscaled; SCALE and SHIFT apply outside.

Source: latent-diffusion's AutoencoderKL as in Stability AI's sd3.5 reference (sd3_impls.py); the oracle of the tests is
diffusers' AutoencoderKL.
"""

# B batch, C channels, H W pixels, h w latent pixels, L = h x w

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.models.vae_architecture import VAEArchitecture

SCALE = 1.5305  # model latents = (latents - SHIFT) * SCALE
SHIFT = 0.0609

LOGVAR_RANGE = (-30.0, 20.0)

_GROUPS = 32


class VAE(nn.Module):
    """Pictures in [-1, 1] to the mean and log-variance of their latents, and latents back to pictures."""

    def __init__(self, architecture: VAEArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)

    def encode(self, pixels_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance, each [B, 16, H/8, W/8], of the unscaled latents of pixels in [-1, 1]."""
        self.check_pixels(pixels_BChw)
        mean, logvar = self.encoder(pixels_BChw).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Returns pixels [B, 3, 8h, 8w], about [-1, 1], of unscaled latents."""
        self.check_latents(latents_BChw)
        return self.decoder(latents_BChw)

    def check_pixels(self, pixels_BChw: Tensor) -> None:
        """Raises ValueError unless the VAE can encode something of this shape."""
        _check(pixels_BChw, self.architecture.image_channels, self.architecture.downscale, "pixels")

    def check_latents(self, latents_BChw: Tensor) -> None:
        """Raises ValueError unless the VAE can decode something of this shape."""
        _check(latents_BChw, self.architecture.latent_channels, 1, "latents")


def draw_latents(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Returns unscaled latents drawn from the moments with the given standard normal noise."""
    return mean + torch.exp(0.5 * logvar) * noise


def to_model_space(latents: Tensor) -> Tensor:
    """Returns the latents that the MMDiT sees, from unscaled ones."""
    return (latents - SHIFT) * SCALE


def from_model_space(latents: Tensor) -> Tensor:
    """Returns unscaled latents, from those that the MMDiT sees."""
    return latents / SCALE + SHIFT


class Encoder(nn.Module):
    def __init__(self, architecture: VAEArchitecture) -> None:
        super().__init__()
        widths, last = architecture.level_widths, architecture.level_widths[-1]
        self.conv_in = _conv3(architecture.image_channels, widths[0])
        self.down = nn.ModuleList(
            Level(
                _resnets(width_in, width, architecture.blocks_per_level),
                downsample=Downsample(width) if level < len(widths) - 1 else None,
            )
            for level, (width_in, width) in enumerate(zip(architecture.encoder_inputs(), widths, strict=True))
        )
        self.mid = Middle(last)
        self.norm_out = _norm(last)
        self.conv_out = _conv3(last, 2 * architecture.latent_channels)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.conv_in(pixels_BCHW)
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, architecture: VAEArchitecture) -> None:
        super().__init__()
        widths, last = architecture.level_widths, architecture.level_widths[-1]
        self.conv_in = _conv3(architecture.latent_channels, last)
        self.mid = Middle(last)
        self.up = nn.ModuleList(  # numbered as in the encoder, the finest level first; run from the coarsest
            Level(
                _resnets(width_in, width, architecture.blocks_per_level + 1),
                upsample=Upsample(width) if level else None,
            )
            for level, (width_in, width) in enumerate(zip(architecture.decoder_inputs(), widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], architecture.image_channels)

    def forward(self, latents_BChw: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents_BChw))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution, then the way to the next."""

    def __init__(
        self, block: nn.ModuleList, *, downsample: "Downsample | None" = None, upsample: "Upsample | None" = None
    ) -> None:
        super().__init__()
        self.block = block
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            return self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Resnet(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = _conv3(width_in, width)
        self.norm2 = _norm(width)
        self.conv2 = _conv3(width, width)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(functional.silu(self.norm1(x)))
        residual = self.conv2(functional.silu(self.norm2(residual)))
        return self.nin_shortcut(x) + residual


class Attention(nn.Module):
    """Self-attention over all latent pixels, one head as wide as the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        normed_BChw = self.norm(x_BChw)
        q_B1LC, k_B1LC, v_B1LC = (
            layer(normed_BChw).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        attended_B1LC = functional.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC)
        attended_BChw = attended_B1LC.squeeze(1).transpose(1, 2).reshape(x_BChw.shape)
        return x_BChw + self.proj_out(attended_BChw)


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = Resnet(width, width)
        self.attn_1 = Attention(width)
        self.block_2 = Resnet(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))  # zeros right and below only, as it was trained


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _check(values_BChw: Tensor, channels: int, multiple: int, name: str) -> None:
    shape = values_BChw.shape
    if len(shape) != 4 or shape[1] != channels or not shape.numel() or shape[2] % multiple or shape[3] % multiple:
        raise ValueError(
            f"{name} of shape {list(shape)}: expected [B, {channels}, h, w] with h and w multiples of {multiple}"
        )


def _resnets(width_in: int, width: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Resnet(width if index else width_in, width) for index in range(count))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, width, eps=1e-6)


def _conv3(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1)
