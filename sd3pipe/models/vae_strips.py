"""Encodes and decodes pictures that are too large for the device in strips of rows, with no seams.

Tiles that run through the whole network differ at their borders, because group norms, attention and padding see the
tile instead of the picture. Here each layer runs over the picture strip by strip: norms use the statistics of the
whole picture, and convolutions get the neighbouring rows. So the result is that of VAE.encode and VAE.decode up to
rounding, while the device holds one strip and the activations lie in host memory. The middle, 1/8 of the size, runs
whole.
"""

# B batch, C channels, G groups, N values of a group, H W pixels, h rows of a strip, h w latent pixels

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.models.vae import LOGVAR_RANGE, VAE, Downsample, Level, Resnet, Upsample
from sd3pipe.models.vae_architecture import VAEArchitecture

STRIP_BYTES = 128 << 20  # of a layer's input or output; a strip needs some four times that on the device
_USABLE = 0.7  # the rest is for weights, convolution workspaces and fragmentation

StripFunction = Callable[[Tensor], Tensor]


def encode_in_strips(vae: VAE, pixels_BCHW: Tensor, *, strip_bytes: int = STRIP_BYTES) -> tuple[Tensor, Tensor]:
    """Returns mean and log-variance as VAE.encode does, on the VAE's device; the pixels may lie anywhere."""
    vae.check_pixels(pixels_BCHW)
    encoder = vae.encoder
    strips = _Strips(device=encoder.conv_in.weight.device, strip_bytes=strip_bytes)
    x = strips.convolve(encoder.conv_in, pixels_BCHW.to("cpu", encoder.conv_in.weight.dtype))
    for level in encoder.down:
        x = _through_level(level, x, strips)
    x = encoder.mid(x.to(strips.device))
    mean, logvar = encoder.conv_out(functional.silu(encoder.norm_out(x))).chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def decode_in_strips(vae: VAE, latents_BChw: Tensor, *, strip_bytes: int = STRIP_BYTES) -> Tensor:
    """Returns pixels as VAE.decode does, in host memory."""
    vae.check_latents(latents_BChw)
    decoder = vae.decoder
    strips = _Strips(device=decoder.conv_in.weight.device, strip_bytes=strip_bytes)
    x = decoder.mid(decoder.conv_in(latents_BChw.to(decoder.conv_in.weight))).cpu()
    for level in reversed(decoder.up):
        x = _through_level(level, x, strips)
    return strips.convolve(decoder.conv_out, x, prepare=strips.normalise(decoder.norm_out, x))


def encode_within(vae: VAE, pixels_BCHW: Tensor, memory_bytes: int | None) -> tuple[Tensor, Tensor]:
    """Returns mean and log-variance, computed in strips if the whole would take more memory. None: no limit."""
    needed = encode_bytes(
        vae.architecture, pixels_BCHW.shape[0] * pixels_BCHW[0, 0].numel(), pixels_BCHW.element_size()
    )
    in_one = memory_bytes is None or needed <= memory_bytes
    return vae.encode(pixels_BCHW) if in_one else encode_in_strips(vae, pixels_BCHW)


def decode_within(vae: VAE, latents_BChw: Tensor, memory_bytes: int | None) -> Tensor:
    """Returns pixels, computed in strips (and then in host memory) if the whole would take more. None: no limit."""
    pixels = latents_BChw.shape[0] * latents_BChw[0, 0].numel() * vae.architecture.downscale**2
    in_one = memory_bytes is None or decode_bytes(vae.architecture, pixels, latents_BChw.element_size()) <= memory_bytes
    return vae.decode(latents_BChw) if in_one else decode_in_strips(vae, latents_BChw)


def usable_memory(device: torch.device, *, beside_others: bool) -> int | None:
    """Returns what the VAE's activations may take on a device, None where strips would save nothing.

    Of a device for itself alone a fixed share, so that one device always computes alike; `beside_others`, of what is
    free at the moment.
    """
    if device.type != "cuda":
        return None
    if beside_others:
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return int(_USABLE * (torch.cuda.mem_get_info(device)[0] + kept))
    return int(_USABLE * torch.cuda.get_device_properties(device).total_memory)


def encode_bytes(architecture: VAEArchitecture, pixels: int, itemsize: int) -> int:
    """Returns about what VAE.encode of so many pixels takes beside the weights.

    A residual block of the finest level has its input, its normed input and a convolution's output alive.
    """
    return 3 * architecture.level_widths[0] * pixels * itemsize


def decode_bytes(architecture: VAEArchitecture, pixels: int, itemsize: int) -> int:
    """Returns about what VAE.decode to so many pixels takes beside the weights.

    The finest level is entered by the width of the next one; three such activations are alive in its first block.
    """
    return 3 * max(architecture.level_widths[:2]) * pixels * itemsize


def _through_level(level: nn.Module, x: Tensor, strips: "_Strips") -> Tensor:
    assert isinstance(level, Level)
    for block in level.block:
        assert isinstance(block, Resnet)
        x = _through_resnet(block, x, strips)
    if level.downsample is not None:
        return strips.downsample(level.downsample, x)
    return x if level.upsample is None else strips.upsample(level.upsample, x)


def _through_resnet(block: Resnet, x: Tensor, strips: "_Strips") -> Tensor:
    """Returns the block's output; where the width stays, in the memory of its input."""
    hidden = strips.convolve(block.conv1, x, prepare=strips.normalise(block.norm1, x))
    keeps_width = isinstance(block.nin_shortcut, nn.Identity)
    return strips.convolve(
        block.conv2,
        hidden,
        prepare=strips.normalise(block.norm2, hidden),
        add=lambda span: block.nin_shortcut(x[:, :, span].to(strips.device)),
        into=x if keeps_width else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strips:
    """The layers of the VAE over host tensors, a strip of rows at a time on the device."""

    device: torch.device
    strip_bytes: int

    def convolve(
        self,
        layer: nn.Conv2d,
        x_BCHW: Tensor,
        *,
        prepare: StripFunction | None = None,
        add: Callable[[slice], Tensor] | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Returns layer(prepare(x)) + add for a 3 x 3 convolution; `prepare` works on each pixel alone.

        `into` may be what `add` reads, because a strip is read before it is written.
        """
        height = x_BCHW.shape[2]
        out = _like(x_BCHW, layer.out_channels, height, x_BCHW.shape[3]) if into is None else into
        for span in self._spans(x_BCHW, layer.out_channels):
            rows_BChW = x_BCHW[:, :, max(span.start - 1, 0) : span.stop + 1].to(self.device)
            rows_BChW = rows_BChW if prepare is None else prepare(rows_BChW)
            padded = functional.pad(rows_BChW, (1, 1, int(span.start == 0), int(span.stop == height)))
            result = functional.conv2d(padded, layer.weight, layer.bias)
            out[:, :, span] = result if add is None else result + add(span)
        return out

    def downsample(self, layer: Downsample, x_BCHW: Tensor) -> Tensor:
        """Returns the picture at half the size, as Downsample does."""
        height = x_BCHW.shape[2]
        out = _like(x_BCHW, layer.conv.out_channels, height // 2, x_BCHW.shape[3] // 2)
        for span in self._spans(x_BCHW):
            rows_BChW = x_BCHW[:, :, span.start : span.stop + 1].to(self.device)
            padded = functional.pad(rows_BChW, (0, 1, 0, int(span.stop == height)))
            result = functional.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)
            out[:, :, span.start // 2 : span.stop // 2] = result
        return out

    def upsample(self, layer: Upsample, x_BCHW: Tensor) -> Tensor:
        """Returns the picture at twice the size, as Upsample does."""
        height = x_BCHW.shape[2]
        out = _like(x_BCHW, layer.conv.out_channels, 2 * height, 2 * x_BCHW.shape[3])
        for span in self._spans(x_BCHW, 4 * layer.conv.out_channels):
            first, last = span.start == 0, span.stop == height
            rows_BChW = x_BCHW[:, :, max(span.start - 1, 0) : span.stop + 1].to(self.device)
            doubled = functional.interpolate(rows_BChW, scale_factor=2.0, mode="nearest")
            doubled = doubled[:, :, 0 if first else 1 : None if last else -1]  # a neighbour gives one of its two rows
            padded = functional.pad(doubled, (1, 1, int(first), int(last)))
            out[:, :, 2 * span.start : 2 * span.stop] = functional.conv2d(padded, layer.conv.weight, layer.conv.bias)
        return out

    def normalise(self, norm: nn.GroupNorm, x_BCHW: Tensor) -> StripFunction:
        """Returns the function that applies the group norm, with the statistics of all of x, and SiLU to a strip."""
        mean_BG, variance_BG = self._statistics(norm, x_BCHW)
        deviation_BG = (variance_BG + norm.eps).sqrt()
        per_channel = norm.num_channels // norm.num_groups
        scale_BC11 = (norm.weight / deviation_BG.repeat_interleave(per_channel, 1))[..., None, None]
        mean_BC11 = mean_BG.repeat_interleave(per_channel, 1)[..., None, None]
        shift_C11 = norm.bias[:, None, None]

        def apply(strip_BChW: Tensor) -> Tensor:
            normed = (strip_BChW - mean_BC11) * scale_BC11 + shift_C11
            return functional.silu(normed).to(strip_BChW.dtype)

        return apply

    def _statistics(self, norm: nn.GroupNorm, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and variance of each group in at least float32, merged from those of the strips (Chan 1983)."""
        precision = torch.promote_types(x_BCHW.dtype, torch.float32)
        count = 0
        mean_BG = torch.zeros(x_BCHW.shape[0], norm.num_groups, dtype=precision, device=self.device)
        squares_BG = torch.zeros_like(mean_BG)  # sum of squared distances from the mean
        for span in self._spans(x_BCHW):
            values_BGN = x_BCHW[:, :, span].to(self.device, precision).unflatten(1, (norm.num_groups, -1)).flatten(2)
            added = values_BGN.shape[2]
            variance, mean = torch.var_mean(values_BGN, dim=2, correction=0)
            distance, total = mean - mean_BG, count + added
            mean_BG = mean_BG + distance * (added / total)
            squares_BG = squares_BG + variance * added + distance.square() * (count * added / total)
            count = total
        return mean_BG, squares_BG / count

    def _spans(self, x_BCHW: Tensor, channels_made: int = 0) -> Iterator[slice]:
        """Yields ranges of rows, an even number each, of which neither input nor output takes over `strip_bytes`."""
        batch, channels, height, width = x_BCHW.shape
        row_bytes = batch * max(channels, channels_made) * width * x_BCHW.element_size()
        rows = max(2, self.strip_bytes // row_bytes // 2 * 2)
        for start in range(0, height, rows):
            yield slice(start, min(start + rows, height))


def _like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], channels, height, width)
