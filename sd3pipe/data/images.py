"""Decodes a picture file into upright sRGB pixels of eight bits, whatever it was saved as."""

# H W pixels, C channels

import io
import warnings

import numpy as np
from PIL import Image, ImageCms

from sd3pipe.data.headers import (
    DECODER_ERRORS,
    MAX_PIXELS,
    has_alpha,
    open_picture,
    orientation,
    reason,
)
from sd3pipe.errors import UnreadablePicture

_FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SRGB_NAMES = ("sRGB", "c2")  # c2 is the name of a much used small sRGB profile
_ICC_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # bytes 16 to 19 of a profile


def decode(data: bytes, suffix: str = "", *, keep_alpha: bool, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Returns the picture as uint8 [height, width, 3], or 4 with `keep_alpha`. Raises UnreadablePicture.

    Of an animation the first frame counts. Colours are converted to sRGB by the embedded profile. Transparency that is
    not kept is dropped as sd-scripts drops it: the colours below it stay as they are.
    """
    image = open_picture(data, suffix, max_pixels)
    turn = _FLIPS.get(orientation(image))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            upright = image.transpose(turn) if turn is not None else image
            return _pixels(upright, image.info.get("icc_profile"), keep_alpha)
    except DECODER_ERRORS as error:
        raise UnreadablePicture(f"it cannot be decoded ({reason(error)})") from error


def composited(pixels_HWC: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Returns RGBA pixels laid over a colour, as uint8 [height, width, 3]."""
    alpha = pixels_HWC[..., 3:].astype(np.float32) / 255
    mixed = pixels_HWC[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def _pixels(image: Image.Image, profile: bytes | None, keep_alpha: bool) -> np.ndarray:
    if not keep_alpha:
        return np.asarray(_srgb(image, profile))
    alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else Image.new("L", image.size, 255)
    return np.dstack([np.asarray(_srgb(image, profile)), np.asarray(alpha)])


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns an RGB picture in sRGB."""
    plain = _eight_bits(image)
    if profile:
        converted = _by_profile(plain, profile)
        if converted is not None:
            return converted
    return plain if plain.mode == "RGB" else plain.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a picture in mode L, RGB, CMYK or another of eight bits, without transparency or palette."""
    mode = image.mode
    if mode in ("L", "RGB", "CMYK"):
        return image
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


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Returns the picture converted to sRGB; None where it is sRGB already or the profile does not fit the picture."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if _ICC_SPACES.get(profile[16:20]) != image.mode or _is_srgb(source):
            return None
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *DECODER_ERRORS):
        return None


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    name = ImageCms.getProfileDescription(profile).strip()
    return name.startswith(_SRGB_NAMES[0]) or name == _SRGB_NAMES[1]
