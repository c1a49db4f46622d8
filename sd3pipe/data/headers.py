"""What a picture's header says, without decoding it. The only part of a scan that needs Pillow."""

import contextlib
import importlib
import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sd3pipe.data.png import without_texts
from sd3pipe.documents import LFS_POINTER, LFS_REMEDY
from sd3pipe.errors import UnreadablePicture

MAX_PIXELS = 200_000_000  # larger than the largest cameras' 150 MP; 600 MB as RGB
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JXL", "MPO", "PNG", "TIFF", "WEBP")  # none runs programs
PLUGINS = {  # Pillow's name of the format: the module to import, the package to install
    "JXL": ("pillow_jxl", "pillow-jxl-plugin"),
    "HEIF": ("pillow_heif", "pillow-heif"),
}
_PLUGIN_BY_ENDING = {".jxl": "JXL", ".heic": "HEIF", ".heif": "HEIF"}
_JXL_SIGNS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError,
    MemoryError, AssertionError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# Pillow refuses a picture for a profile of more than a megabyte. Texts are left out of a PNG before it is opened.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Size after EXIF orientation; whether there is transparency; whether there are further frames."""

    width: int
    height: int
    has_alpha: bool
    animated: bool


def open_picture(data: bytes, suffix: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture opened but not decoded. Raises UnreadablePicture."""
    if not data:
        raise UnreadablePicture("the file is empty")
    if data.startswith(LFS_POINTER):
        raise UnreadablePicture(f"it {LFS_REMEDY}")
    plugin = _plugin(data, suffix)
    if plugin is not None and plugin not in _known_formats():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(PLUGINS[plugin][0])
            getattr(module, "register_heif_opener", lambda: None)()
    formats = [name for name in FORMATS if name in _known_formats()]
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # this module has its own limit, which says what to do
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(without_texts(data)), formats=formats)
    except UnidentifiedImageError as error:
        raise UnreadablePicture(_unknown_format(plugin, suffix)) from error
    except DECODER_ERRORS as error:
        raise UnreadablePicture(f"its header is damaged ({reason(error)})") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max_pixels:
        raise UnreadablePicture(
            f"it claims {image.width} x {image.height} pixels, more than the limit of {max_pixels / 1e6:g} megapixels"
        )
    if image.width < 1 or image.height < 1:
        raise UnreadablePicture("it has no pixels")
    return image


def read_header(data: bytes, suffix: str = "") -> Header:
    """Returns what the header of a picture file says. Raises UnreadablePicture."""
    image = open_picture(data, suffix)
    width, height = image.size[::-1] if orientation(image) in _TURNED else image.size
    try:
        animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # a camera's MPO holds previews
    except DECODER_ERRORS:
        animated = False
    return Header(width=width, height=height, has_alpha=has_alpha(image), animated=animated)


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that stands before the pixels, 1 where there is none or it is damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look behind it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def has_alpha(image: Image.Image) -> bool:
    """Returns whether the picture carries transparency in any form."""
    return "A" in image.getbands() or "transparency" in image.info


def reason(error: BaseException) -> str:
    """Returns an error's text without memory addresses and on one line, so that it is the same in every run."""
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or " at 0x" in text else text


def _known_formats() -> Mapping[str, object]:
    Image.init()
    return Image.OPEN


def _plugin(data: bytes, suffix: str) -> str | None:
    """Returns the format that wants a plugin by the file's ending or, as pictures get renamed, by its bytes."""
    if suffix.lower() in _PLUGIN_BY_ENDING:
        return _PLUGIN_BY_ENDING[suffix.lower()]
    if data.startswith(_JXL_SIGNS):
        return "JXL"
    brands = data[8 : int.from_bytes(data[:4])][:256] if data[4:8] == b"ftyp" else b""
    return "HEIF" if any(brand in brands for brand in _HEIF_BRANDS) else None


def _unknown_format(plugin: str | None, suffix: str) -> str:
    if plugin is None or plugin in _known_formats():
        return "it is no picture in a format that is read here"
    _, package = PLUGINS[plugin]
    what = f"{suffix.lower()} files" if suffix.lower() in _PLUGIN_BY_ENDING else f"the {plugin} picture in it"
    return f"Pillow needs a plugin for {what}: pip install {package}"
