"""Decodes a picture file into upright sRGB pixels of eight bits, whatever it was saved as."""

# H W pixels, C channels

import contextlib
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from sd3pipe.data.headers import DECODER_ERRORS, MAX_PIXELS, has_alpha, open_picture, orientation, reason
from sd3pipe.errors import UnreadablePicture

try:
    import simplejpeg
except ImportError:  # where it has no wheel
    simplejpeg = None

_Turn = Callable[[np.ndarray], np.ndarray]
_TURNS: dict[int, _Turn] = {
    2: lambda pixels_HWC: pixels_HWC[:, ::-1],
    3: lambda pixels_HWC: pixels_HWC[::-1, ::-1],
    4: lambda pixels_HWC: pixels_HWC[::-1],
    5: lambda pixels_HWC: pixels_HWC.swapaxes(0, 1),
    6: lambda pixels_HWC: pixels_HWC.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels_HWC: pixels_HWC[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels_HWC: pixels_HWC.swapaxes(0, 1)[::-1],
}
_ICC_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # bytes 16 to 19 of a profile


def decode(
    data: bytes,
    suffix: str = "",
    *,
    keep_alpha: bool,
    max_pixels: int = MAX_PIXELS,
    at_least_px: int | None = None,
) -> np.ndarray:
    """Returns the picture as uint8 [height, width, 3], or 4 with `keep_alpha`. Raises UnreadablePicture.

    With `at_least_px` a JPEG may come at a half, a quarter or an eighth of its size, if its sides are that long then:
    in a fraction of the time. Of an animation the first frame counts. Colours are converted to sRGB by the embedded
    profile. Transparency that is not kept is dropped as sd-scripts drops it: the colours below it stay as they are.
    """
    image = open_picture(data, suffix, max_pixels)
    turn, profile = _TURNS.get(orientation(image)), image.info.get("icc_profile")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reduced = at_least_px is not None and image.draft(None, (at_least_px, at_least_px)) is not None
            pixels_HWC = None if keep_alpha or reduced else _photograph(image, data, profile)
            if pixels_HWC is None:
                image.load()
                pixels_HWC = np.asarray(_srgb(image, profile))
            if keep_alpha:
                alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else Image.new("L", image.size, 255)
                pixels_HWC = np.dstack([pixels_HWC, np.asarray(alpha)])
            return pixels_HWC if turn is None else np.ascontiguousarray(turn(pixels_HWC))
    except DECODER_ERRORS as error:
        raise UnreadablePicture(f"it cannot be decoded ({reason(error)})") from error


def decode_on_white(data: bytes, suffix: str, *, has_alpha: bool, at_least_px: int | None = None) -> np.ndarray:
    """Returns the picture as `decode` does, over white where it has transparency."""
    pixels_HWC = decode(data, suffix, keep_alpha=has_alpha, at_least_px=at_least_px)
    return composited(pixels_HWC, (255, 255, 255)) if has_alpha else pixels_HWC


def composited(pixels_HWC: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Returns RGBA pixels laid over a colour, as uint8 [height, width, 3]."""
    alpha = pixels_HWC[..., 3:].astype(np.float32) / 255
    mixed = pixels_HWC[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def _photograph(image: Image.Image, data: bytes, profile: bytes | None) -> np.ndarray | None:
    """Returns the pixels of a JPEG in sRGB by simplejpeg; None for any other, and where it complains of anything.

    Both libraries hold libjpeg-turbo and make the same pixels of a whole file; Pillow takes three times as long.
    """
    if simplejpeg is None or image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    if profile and _foreign(profile, image.mode):
        return None
    try:
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels_HWC if pixels_HWC.shape[1::-1] == image.size else None


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    plain = _eight_bits(image)
    if profile and (source := _foreign(profile, plain.mode)):
        with contextlib.suppress(ImageCms.PyCMSError, *DECODER_ERRORS):
            converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    return plain if plain.mode == "RGB" else plain.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a picture in mode L, RGB, CMYK or another of eight bits, without transparency or palette."""
    mode = image.mode
    if mode in ("L", "RGB", "CMYK"):
        return image
    if mode == "I" and image.format == "TIFF":  # a PNG of 16 bits may come as such, too
        raise ValueError("integer levels of 32 bits, of which nobody knows how many are white: save it with 8 or 16")
    if mode.startswith("I;16") or mode == "I":
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((np.clip(levels, 0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        levels = np.asarray(image)
        if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > 1:
            raise ValueError("floating-point levels outside 0 to 1")
        return Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    if mode == "LA":
        return image.getchannel("L")
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "PA") and has_alpha(image):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _foreign(profile: bytes, mode: str) -> ImageCms.ImageCmsProfile | None:
    """Returns a profile that fits pictures of a mode and is another than sRGB's."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        is_srgb = name.startswith("sRGB") or name == "c2"  # the name of a much used small sRGB profile
        return None if is_srgb or _ICC_SPACES.get(profile[16:20]) != mode else source
    except (ImageCms.PyCMSError, *DECODER_ERRORS):
        return None
