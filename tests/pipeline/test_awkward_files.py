"""Forty awkward files in one folder: the run completes, the quarantine list is exact, the good rows are intact."""

import io
import json
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from support.tiny_base import write_tiny_base

from sd3pipe.cache.reader import CacheReader
from sd3pipe.commands.encode_latents import main
from sd3pipe.params.encode_latents import EncodeLatentsParams

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def saved(format, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width, height, depth=8, colour=2, body=b"\0" * 100):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def fuzzed(data, seed, first=0, last=60, flips=12):
    """Bytes of the header overwritten at random places."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(flips):
        out[rng.randrange(first, min(last, len(out)))] = rng.randrange(256)
    return bytes(out)


PNG, JPEG, WEBP, BMP = saved("PNG"), saved("JPEG", quality=95), saved("WEBP", lossless=True), saved("BMP")

BAD = {
    "zero.png": b"",
    "zero.jpg": b"",
    "one byte.webp": b"R",
    "text.png": b"a picture of a cat\n",
    "nulls.jpg": b"\0" * 4096,
    "png half.png": PNG[: len(PNG) // 2],
    "jpeg half.jpg": JPEG[: len(JPEG) // 2],
    "webp half.webp": WEBP[: len(WEBP) // 2],
    "bmp half.bmp": BMP[: len(BMP) // 2],
    "png signature.png": PNG[:8],
    "jpeg marker.jpg": JPEG[:3],
    "webp riff.webp": WEBP[:12],
    "huge claim.png": png_claiming(30_000, 30_000),
    "wide claim.png": png_claiming(2**31 - 1, 2**31 - 1),
    "flat claim.png": png_claiming(0, 100),
    "short data.png": png_claiming(64, 64),
    "odd depth.png": png_claiming(8, 8, depth=7),
    "bad checksum.png": PNG[:40] + bytes([PNG[40] ^ 1]) + PNG[41:],
    "gzip.jpg": zlib.compress(PNG),
    "html.webp": b"<html>404</html>",
    "eps.png": saved("EPS"),
    "pdf.jpg": saved("PDF"),
    "huge.bmp": BMP[:18] + struct.pack("<ii", 40_000, 40_000) + BMP[26:],
    "jpeg of noise.jpg": b"\xff\xd8\xff\xe0" + RNG.bytes(500),
    "png of noise.png": PNG[:8] + RNG.bytes(500),
    "webp of noise.webp": WEBP[:8] + b"WEBP" + RNG.bytes(500),
}
MAYBE = {  # what Pillow alone cannot decode is to be listed, and nothing else
    **{f"fuzzed {seed}.png": fuzzed(PNG, seed, 8) for seed in range(4)},
    **{f"fuzzed {seed}.jpg": fuzzed(JPEG, seed, 2, 600, flips=2) for seed in range(4)},
    **{f"fuzzed {seed}.webp": fuzzed(WEBP, seed, 4) for seed in range(3)},
    **{f"fuzzed {flips}.bmp": fuzzed(BMP, 0, 2, flips=flips) for flips in (1, 12)},
}
GOOD = {
    "good.png": PNG,
    "jpeg in truth.png": JPEG,
    "png in truth.jpg": PNG,
    "gif in truth.webp": saved("GIF"),
    "name\nwith newline.png": saved("PNG", Image.fromarray(NOISE[::-1].copy())),
    b"caf\xe9 \xff.png": BMP,
    "tail.jpg": JPEG + b"trailing bytes",
    "sixteen bits.png": saved("PNG", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)),
    "one pixel.png": saved("PNG", Image.new("RGB", (1, 1), "red")),
}


def is_decoded(data):
    """Whether Pillow decodes a picture when it is asked without any ado."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            return image.width * image.height <= 200_000_000 and bool(image.load())
    except Exception:
        return False


LINKS = {"loop.png": "loop.png", "nowhere.jpg": "missing.jpg"}


def write_all(folder):
    folder.mkdir()
    for name, data in {**BAD, **MAYBE, **GOOD}.items():
        with open(os.fsencode(folder) + b"/" + os.fsencode(name), "wb") as handle:
            handle.write(data)
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward")
    write_all(folder / "pics")
    (folder / "d.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pics'\n")
    model = str(write_tiny_base(folder / "base").model)
    main(
        EncodeLatentsParams(
            model=model,
            dataset=folder / "d.toml",
            out=folder / "latents",
            max_quarantined="100",
            threads=1,
            max_data_loader_n_workers=2,
        )
    )
    return folder


def test_there_are_at_least_forty_awkward_files():
    assert len({**BAD, **MAYBE, **GOOD, **LINKS}) >= 40


def test_the_quarantine_list_is_exact(run):
    cache = CacheReader(run / "latents")
    listed = {entry["name"] for entry in cache.manifest.quarantined}
    undecodable = {name for name, data in MAYBE.items() if not is_decoded(data)}
    assert 0 < len(undecodable) < len(MAYBE)
    assert listed == {*BAD, *LINKS, *undecodable, "pipe.png"}
    assert len(cache.manifest.quarantined) == len(listed)
    kept = set(cache.samples.strings("name").to_list())
    assert kept | listed == {*BAD, *MAYBE, *LINKS, "pipe.png", *map(os.fsdecode, GOOD)}
    assert not kept & listed
    report = json.loads((run / "latents.report.json").read_text())
    assert report["quarantined"] == len(listed) and report["exit_code"] == 0


def test_every_reason_is_one_readable_line(run):
    for entry in CacheReader(run / "latents").manifest.quarantined:
        assert entry["reason"].isprintable() and 10 < len(entry["reason"]) < 200
        assert "0x" not in entry["reason"] and str(run) not in entry["reason"]


def test_good_rows_are_intact(run):
    cache = CacheReader(run / "latents", verify_reads="always")
    names = cache.samples.strings("name").to_list()
    rows = {name: cache.row(int(cache.samples.numbers("row")[n]))["moments"].numpy() for n, name in enumerate(names)}
    assert np.array_equal(rows["good.png"], rows["png in truth.jpg"])
    assert np.array_equal(rows["good.png"], rows[os.fsdecode(b"caf\xe9 \xff.png")])  # the BMP holds the same pixels
    assert all(np.isfinite(row).all() and row.shape == (32, 8, 8) for row in rows.values())


def test_claims_of_size_are_refused_before_memory_is_taken(run):
    reasons = {entry["name"]: entry["reason"] for entry in CacheReader(run / "latents").manifest.quarantined}
    assert reasons["huge claim.png"] == "it claims 30000 x 30000 pixels, more than the limit of 200 megapixels"
    assert "40000" in reasons["huge.bmp"]


def test_a_second_run_tries_no_unreadable_file_again(run):
    manifest = (run / "latents" / "manifest.json").read_bytes()
    model = next((run / "base").glob("*.safetensors"))
    main(EncodeLatentsParams(model=str(model), dataset=run / "d.toml", out=run / "latents", max_quarantined="100%"))
    report = json.loads((run / "latents.report.json").read_text())
    assert report["encoded"] == 0 and (run / "latents" / "manifest.json").read_bytes() == manifest
