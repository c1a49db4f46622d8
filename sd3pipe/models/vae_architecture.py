"""What a VAE looks like, told from its tensors' shapes alone. Free of torch.

Keys are the native checkpoint keys without their prefix. Layout: latent-diffusion's AutoencoderKL, without quant_conv.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sd3pipe.errors import InputError

Shapes = dict[str, tuple[int, ...]]

_NAMED_KEYS = 4  # keys that an error message spells out before it counts the rest


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

    def shapes(self) -> Shapes:
        """Returns every native key with its shape, encoder first."""
        return self._encoder_shapes() | self._decoder_shapes()

    def encoder_inputs(self) -> tuple[int, ...]:
        """Returns the width that enters each encoder level, finest first."""
        return (self.level_widths[0], *self.level_widths[:-1])

    def decoder_inputs(self) -> tuple[int, ...]:
        """Returns the width that enters each decoder level, finest first; the coarsest is entered first."""
        return (*self.level_widths[1:], self.level_widths[-1])

    def _encoder_shapes(self) -> Shapes:
        first, last = self.level_widths[0], self.level_widths[-1]
        shapes = _conv("encoder.conv_in", first, self.image_channels, 3)
        for level, (width_in, width) in enumerate(zip(self.encoder_inputs(), self.level_widths, strict=True)):
            for block in range(self.blocks_per_level):
                shapes |= _resnet(f"encoder.down.{level}.block.{block}", width if block else width_in, width)
            if level < len(self.level_widths) - 1:
                shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        shapes |= _middle("encoder.mid", last) | _vector("encoder.norm_out", last)
        return shapes | _conv("encoder.conv_out", 2 * self.latent_channels, last, 3)

    def _decoder_shapes(self) -> Shapes:
        first, last = self.level_widths[0], self.level_widths[-1]
        shapes = _conv("decoder.conv_in", last, self.latent_channels, 3) | _middle("decoder.mid", last)
        for level, (width_in, width) in reversed(
            list(enumerate(zip(self.decoder_inputs(), self.level_widths, strict=True)))
        ):
            for block in range(self.blocks_per_level + 1):
                shapes |= _resnet(f"decoder.up.{level}.block.{block}", width if block else width_in, width)
            if level:
                shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        return shapes | _vector("decoder.norm_out", first) | _conv("decoder.conv_out", self.image_channels, first, 3)


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
    levels = _count(shapes, "encoder.down.")
    architecture = VAEArchitecture(
        level_widths=tuple(
            _axes(shapes, f"encoder.down.{level}.block.0.conv1.weight", where)[0] for level in range(levels)
        ),
        blocks_per_level=_count(shapes, "encoder.down.0.block."),
        latent_channels=latent_channels,
        image_channels=_axes(shapes, "encoder.conv_in.weight", where)[1],
    )
    if not levels or any(width % 32 for width in architecture.level_widths):
        raise InputError(f"{where}: the VAE's channels {list(architecture.level_widths)} are no multiples of 32")
    _compare(architecture.shapes(), shapes, where)
    return architecture


def _conv(name: str, channels_out: int, channels_in: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (channels_out, channels_in, kernel, kernel), f"{name}.bias": (channels_out,)}


def _vector(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, width_in: int, width: int) -> Shapes:
    shapes = _vector(f"{name}.norm1", width_in) | _conv(f"{name}.conv1", width, width_in, 3)
    shapes |= _vector(f"{name}.norm2", width) | _conv(f"{name}.conv2", width, width, 3)
    return shapes if width_in == width else shapes | _conv(f"{name}.nin_shortcut", width, width_in, 1)


def _middle(name: str, width: int) -> Shapes:
    shapes = _resnet(f"{name}.block_1", width, width) | _vector(f"{name}.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{projection}", width, width, 1)
    return shapes | _resnet(f"{name}.block_2", width, width)


def _axes(shapes: Mapping[str, tuple[int, ...]], key: str, where: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != 4:
        found = "is missing" if shape is None else f"has shape {list(shape)}, not four axes"
        raise InputError(f"{where}: no VAE of SD3's kind here: {key} {found}")
    return shape


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    numbers = {key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}
    return len({number for number in numbers if number.isdecimal()})


def _compare(expected: Shapes, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    missing = [key for key in expected if key not in found]
    excess = sorted(found.keys() - expected.keys())
    other = [key for key, shape in expected.items() if key in found and tuple(found[key]) != shape]
    if missing:
        raise InputError(f"{where}: the VAE lacks {_listed(missing)}: the file is incomplete")
    if excess:
        raise InputError(f"{where}: the VAE has tensors that are not understood: {_listed(excess)}")
    if other:
        key = other[0]
        raise InputError(f"{where}: {key} of the VAE is {list(found[key])} and should be {list(expected[key])}")


def _listed(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_KEYS
    return ", ".join(keys[:_NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
