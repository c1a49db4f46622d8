"""Decoding: whatever a picture was saved as, upright sRGB pixels of eight bits come out."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from sd3pipe.data import images
from sd3pipe.data.headers import open_picture, read_header
from sd3pipe.data.images import composited, decode
from sd3pipe.errors import UnreadablePicture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(data, **options):
    return decode(data, keep_alpha=False, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = saved(Image.fromarray(PIXELS), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(rgb(data), expected)
    header = read_header(data)
    assert (header.height, header.width) == expected.shape[:2]


PHOTOGRAPH = np.kron(RNG.integers(0, 256, (5, 9, 3), dtype=np.uint8), np.ones((7, 5, 1), np.uint8))
KINDS_OF_JPEG = {
    "plain": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "coarse": {"quality": 5},
    "restarts": {"restart_marker_blocks": 3},
    "as RGB": {"keep_rgb": True},
    "exif": {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"},
}


@pytest.mark.parametrize("kind", KINDS_OF_JPEG)
@pytest.mark.parametrize("size", [(45, 35), (44, 33), (1, 1), (17, 2)])
def test_photographs_have_the_pixels_that_pillow_makes(monkeypatch, kind, size):
    pytest.importorskip("simplejpeg")
    data = saved(Image.fromarray(PHOTOGRAPH[: size[1], : size[0]]), "JPEG", **KINDS_OF_JPEG[kind])
    expected = np.asarray(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(images, "_srgb", None)  # Pillow's pixels are not asked for
    assert np.array_equal(rgb(data), expected)


def test_without_simplejpeg_pillow_makes_the_same_pixels(monkeypatch):
    data = saved(Image.fromarray(PHOTOGRAPH), "JPEG")
    pixels = rgb(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(rgb(data), pixels)


def test_a_jpeg_cut_short_or_with_a_flaw_is_what_pillow_says(monkeypatch):
    data = saved(Image.fromarray(PHOTOGRAPH), "JPEG", quality=95)
    flaw = data[:-200] + b"\xff\xd0" + data[-198:]
    for damaged in (data[:-40], flaw, data[:-2]):
        outcomes = []
        for library in (images.simplejpeg, None):
            monkeypatch.setattr(images, "simplejpeg", library)
            try:
                outcomes.append(rgb(damaged).tobytes())
            except UnreadablePicture as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_a_nonsensical_orientation_is_no_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(rgb(saved(Image.fromarray(PIXELS), exif=exif)), PIXELS)


def wide_gamut_profile():
    """An RGB profile other than sRGB: Pillow makes none, so sRGB's own red and green columns are swapped."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[p : p + 4]): p for p in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    start = int.from_bytes(data[tags[b"desc"] + 4 : tags[b"desc"] + 8], "big")
    size = int.from_bytes(data[tags[b"desc"] + 8 : tags[b"desc"] + 12], "big")
    text = bytes(data[start : start + size])
    data[start : start + size] = text.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(
        b"sRGB", b"swap"
    )
    return bytes(data)


def test_colours_are_converted_to_srgb_by_the_profile():
    plain = np.full((4, 4, 3), (250, 20, 30), np.uint8)
    converted = rgb(saved(Image.fromarray(plain), icc_profile=wide_gamut_profile()))[0, 0]
    assert converted[1] > 200 > 100 > converted[0]  # the profile calls the first channel green


def test_an_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(rgb(saved(Image.fromarray(PIXELS), icc_profile=profile)), PIXELS)


@pytest.mark.parametrize("profile", [b"", b"nonsense", b"\0" * 200])
def test_a_broken_profile_is_none(profile):
    assert np.array_equal(rgb(saved(Image.fromarray(PIXELS), icc_profile=profile)), PIXELS)


def test_sixteen_bits_are_rounded_to_eight():
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    assert rgb(saved(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_integers_of_32_bits_say_nothing_of_white(white):
    levels = Image.fromarray(np.array([[0, white]], np.int32))
    with pytest.raises(UnreadablePicture, match="integer levels of 32 bits"):
        rgb(saved(levels, "TIFF"))


def test_grey_is_equal_in_all_channels():
    decoded = rgb(saved(Image.fromarray(PIXELS[..., 0])))
    assert np.array_equal(decoded, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_one_bit_is_black_and_white():
    assert set(rgb(saved(Image.fromarray(PIXELS[..., 0] > 100))).flatten()) == {0, 255}


def test_palettes_are_looked_up_with_and_without_transparency():
    image = Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(rgb(saved(image)), expected)
    assert np.array_equal(rgb(saved(image, transparency=0)), expected)
    kept = decode(saved(image, transparency=0), keep_alpha=True)
    assert set(kept[..., 3].flatten()) == {0, 255}


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    decoded = rgb(saved(image, "JPEG", quality=100)).astype(int)
    assert np.abs(decoded - (255, 0, 0)).max() <= 3


def test_alpha_is_dropped_kept_or_composited():
    rgba = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 51, np.uint8)])
    rgba[0, 0, 3] = 0
    data = saved(Image.fromarray(rgba))
    assert np.array_equal(rgb(data), PIXELS)  # the colours below stay, as in sd-scripts
    assert np.array_equal(decode(data, keep_alpha=True), rgba)
    mixed = composited(decode(data, keep_alpha=True), (255, 255, 255)).astype(float)
    assert mixed[0, 0].tolist() == [255, 255, 255]
    assert np.abs(mixed[1:] - (PIXELS[1:] * 0.2 + 255 * 0.8)).max() <= 0.5


def test_pictures_without_alpha_are_opaque():
    assert (decode(saved(Image.fromarray(PIXELS)), keep_alpha=True)[..., 3] == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    assert read_header(data).animated
    assert rgb(data)[0, 0].tolist() == [255, 0, 0]


def test_avif_is_read():
    decoded = rgb(saved(Image.new("RGB", (32, 32), (200, 30, 40)), "AVIF", quality=95)).astype(int)
    assert np.abs(decoded - (200, 30, 40)).max() < 12


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded():
    data = saved(Image.new("1", (3000, 2000)))
    with pytest.raises(UnreadablePicture, match="3000 x 2000 pixels, more than the limit of 5 megapixels"):
        decode(data, keep_alpha=False, max_pixels=5_000_000)


def test_a_cut_off_picture_is_refused():
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(UnreadablePicture, match="cannot be decoded"):
        rgb(saved(Image.fromarray(noise))[:2000])


def test_formats_that_run_programs_are_no_pictures():
    with pytest.raises(UnreadablePicture, match="no picture"):
        rgb(saved(Image.fromarray(PIXELS), "EPS"))


@pytest.mark.parametrize(
    "ending, module, format",
    [
        (".jxl", "pillow_jxl", "JXL"),
        (".HEIC", "pillow_heif", "HEIF"),
        (".jpg", "pillow_jxl", "JXL"),
        (".jpg", "pillow_heif", "HEIF"),
    ],
)
def test_plugins_are_found_by_the_ending_and_by_the_bytes(ending, module, format):
    plugin = pytest.importorskip(module)
    getattr(plugin, "register_heif_opener", lambda: None)()
    data = saved(Image.new("RGB", (64, 48), (200, 30, 40)), format, quality=95)
    script = f"""
import sys
from sd3pipe.data.images import decode
assert {module!r} not in sys.modules
print(decode(sys.stdin.buffer.read(), {ending!r}, keep_alpha=False).mean(axis=(0, 1)).round().astype(int).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert np.abs(np.array(json.loads(done.stdout)) - (200, 30, 40)).max() < 12


@pytest.mark.parametrize("ending, package", [(".jxl", "pillow-jxl-plugin"), (".heif", "pillow-heif")])
def test_a_missing_plugin_is_named(monkeypatch, ending, package):
    monkeypatch.setattr("sd3pipe.data.headers._known_formats", lambda: {"PNG": None})
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UnreadablePicture, match=f"Pillow needs a plugin for {ending} files: pip install {package}"):
        decode(b"\xff\x0a" + bytes(40), ending, keep_alpha=False)


@pytest.mark.parametrize(
    ("begin", "package"),
    [
        (b"\xff\x0a", "pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "pillow-heif"),
        (b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", None),
        (b"<html>", None),
    ],
)
def test_a_picture_under_a_wrong_ending_names_the_plugin_that_it_needs(monkeypatch, begin, package):
    monkeypatch.setattr("sd3pipe.data.headers._known_formats", lambda: {"PNG": None})
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UnreadablePicture) as caught:
        read_header(begin + bytes(400), ".jpg")
    assert (f"picture in it: pip install {package}" if package else "it is no picture") in str(caught.value)


def _png(*chunks, behind=b""):
    """A small PNG with further chunks before its pixels, and one behind them."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "PNG")
    data = file.getvalue()
    end_of_header, end = 33, len(data) - 12
    return data[:end_of_header] + b"".join(chunks) + data[end_of_header:end] + behind + data[end:]


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_HUGE = zlib.compress(bytes(300 << 20), 1)  # more than Pillow unpacks by any of its settings here
_WORKFLOW = _chunk(b"zTXt", b"workflow\0\0" + _HUGE)


@pytest.mark.parametrize(
    "data",
    [
        _png(_WORKFLOW),
        _png(behind=_WORKFLOW),
        _png(*[_chunk(b"tEXt", b"a\0" + b"x" * (5 << 20))] * 20),
        _png(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + _HUGE)),
        _png(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * (5 << 20))),
        _png(_chunk(b"iCCP", b"profile\0\0" + _HUGE)),
        _png(_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20)))),
        _png(_chunk(b"eXIf", b"MM\0*\0\0\0\x08" + bytes(3 << 20))),
    ],
    ids=["text", "text-behind", "texts", "packed-xmp", "xmp", "huge-profile", "profile", "exif"],
)
def test_a_png_keeps_its_pixels_whatever_text_and_profile_it_carries(data):
    assert open_picture(data).convert("RGB").getpixel((0, 0)) == (0, 128, 128)
    assert decode(data, keep_alpha=False)[0, 0].tolist() == [0, 128, 128]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_other_formats_keep_their_pixels_with_large_texts_and_profiles(kind):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010E] = "x" * (50_000 if kind == "JPEG" else 3 << 20)  # a JPEG's is one segment of 64 KiB
    image = Image.new("RGB", (8, 8), "teal")
    image.save(file, kind, exif=exif.tobytes(), icc_profile=bytes(3 << 20), quality=100)
    assert np.abs(decode(file.getvalue(), keep_alpha=False)[0, 0].astype(int) - [0, 128, 128]).max() <= 2  # lossy


def test_the_orientation_in_a_png_counts_whatever_text_stands_around_it(tmp_path):
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=exif, pnginfo=info)
    header = read_header((tmp_path / "a.png").read_bytes())
    assert (header.width, header.height) == (4, 8)
