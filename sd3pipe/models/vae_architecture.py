"""What a VAE looks like, told from its tensors' shapes alone. Free of torch.

Keys are the native checkpoint keys without their prefix. Layout: latent-diffusion's AutoencoderKL, without quant_conv.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sd3pipe.errors import InputError
from sd3pipe.models.shapes import Shapes, compare_shapes, count_numbered, vector_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEArchitecture:
    """The numbers that fix every tensor of a VAE."""

    level_widths: tuple[int, ...] = (128, 256, 512, 512)  # channels a resolution level, finest first
    blocks_per_level: int = 2  # the decoder has one more
    latent_channels: int = 16
    image_channels: int = 3

    @property
    def downscale(self) -> int:
        """How many pixels a latent pixel is wide."""
        return 2 ** (len(self.level_widths) - 1)

    def row_bytes(self, size: tuple[int, int], *, moments: bool, value_bytes: int) -> int:
        """Returns the size of a picture's latents: of each a mean and, with `moments`, a variance."""
        width, height = size
        latents = (width // self.downscale) * (height // self.downscale)
        return latents * self.latent_channels * (1 + moments) * value_bytes

    def shapes(self) -> Shapes:
        """Returns every native key with its shape, encoder first."""
        widths, blocks = self.level_widths, self.blocks_per_level
        first, last = widths[0], widths[-1]
        shapes = _conv("encoder.conv_in", first, self.image_channels, 3)
        for level, (width_in, width) in enumerate(zip(self.encoder_inputs(), widths, strict=True)):
            for block in range(blocks):
                shapes |= _resnet(f"encoder.down.{level}.block.{block}", width if block else width_in, width)
            if level < len(widths) - 1:
                shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        shapes |= _middle("encoder.mid", last) | vector_shapes("encoder.norm_out", last)
        shapes |= _conv("encoder.conv_out", 2 * self.latent_channels, last, 3)
        shapes |= _conv("decoder.conv_in", last, self.latent_channels, 3) | _middle("decoder.mid", last)
        for level in reversed(range(len(widths))):
            width_in, width = self.decoder_inputs()[level], widths[level]
            for block in range(blocks + 1):
                shapes |= _resnet(f"decoder.up.{level}.block.{block}", width if block else width_in, width)
            if level:
                shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        shapes |= vector_shapes("decoder.norm_out", first)
        return shapes | _conv("decoder.conv_out", self.image_channels, first, 3)

    def encoder_inputs(self) -> tuple[int, ...]:
        """Returns the width that enters each encoder level, finest first."""
        return (self.level_widths[0], *self.level_widths[:-1])

    def decoder_inputs(self) -> tuple[int, ...]:
        """Returns the width that enters each decoder level, finest first; the coarsest is entered first."""
        return (*self.level_widths[1:], self.level_widths[-1])


def detect_vae(shapes: Mapping[str, tuple[int, ...]], where: str) -> VAEArchitecture:
    """Returns the architecture that has exactly these native keys and shapes.

    Raises InputError where keys are missing, in excess, or of another shape than the rest implies.
    """
    latent_channels = _axes(shapes, "decoder.conv_in.weight", where)[1]
    if "quant_conv.weight" in shapes or "post_quant_conv.weight" in shapes:
        raise InputError(
            f"{where}: this VAE has {latent_channels} latent channels and a quant_conv, as SD1.5 and SDXL have it: "
            "pass the 16-channel VAE of SD3 as --vae"
        )
    levels = count_numbered(shapes, "encoder.down.")
    architecture = VAEArchitecture(
        level_widths=tuple(
            _axes(shapes, f"encoder.down.{level}.block.0.conv1.weight", where)[0] for level in range(levels)
        ),
        blocks_per_level=count_numbered(shapes, "encoder.down.0.block."),
        latent_channels=latent_channels,
        image_channels=_axes(shapes, "encoder.conv_in.weight", where)[1],
    )
    if not levels or any(width % 32 for width in architecture.level_widths):
        raise InputError(f"{where}: the VAE's channels {list(architecture.level_widths)} are no multiples of 32")
    compare_shapes(f"{where}: the VAE", architecture.shapes(), shapes)
    return architecture


def _conv(name: str, channels_out: int, channels_in: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (channels_out, channels_in, kernel, kernel), f"{name}.bias": (channels_out,)}


def _resnet(name: str, width_in: int, width: int) -> Shapes:
    shapes = vector_shapes(f"{name}.norm1", width_in) | _conv(f"{name}.conv1", width, width_in, 3)
    shapes |= vector_shapes(f"{name}.norm2", width) | _conv(f"{name}.conv2", width, width, 3)
    return shapes if width_in == width else shapes | _conv(f"{name}.nin_shortcut", width, width_in, 1)


def _middle(name: str, width: int) -> Shapes:
    shapes = _resnet(f"{name}.block_1", width, width) | vector_shapes(f"{name}.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{projection}", width, width, 1)
    return shapes | _resnet(f"{name}.block_2", width, width)


def _axes(shapes: Mapping[str, tuple[int, ...]], key: str, where: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != 4:
        found = "is missing" if shape is None else f"has shape {list(shape)}, not four axes"
        raise InputError(f"{where}: no VAE of SD3's kind here: {key} {found}")
    return shape
