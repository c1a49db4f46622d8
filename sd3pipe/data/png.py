"""Takes out of a PNG file what is no part of its picture: texts, and what unpacks to more than any profile is.

A text of our own, a sample's title, is read from the chunk itself.
"""

import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AROUND = 12  # bytes of length, type and checksum around a chunk's data
_XMP = b"XML:com.adobe.xmp\0\0"  # not packed, as its standard says
_MOST_XMP = 1 << 20  # it may hold the orientation of the picture
_MOST_PROFILE = 64 << 20
_MOST_TEXT = 10_000
_MOST_DEFLATED = 1032  # times the size that zlib can unpack to at the most


def without_texts(data: bytes) -> bytes:
    """Returns the bytes of a picture file; those of a PNG without texts, which programs fill with whole workflows.

    Pillow would unpack all of them, and refuse the picture for their size.
    """
    if not data.startswith(_SIGNATURE):
        return data
    kept, begin = [], 0
    for kind, start, end in _chunks(data):
        if (
            kind in (b"tEXt", b"zTXt")
            or (kind == b"iTXt" and (end - start - _AROUND > _MOST_XMP or not data.startswith(_XMP, start + 8)))
            or (kind == b"iCCP" and _unpacks_beyond(data[start + 8 : end - 4], _MOST_PROFILE))
        ):
            kept.append(data[begin:start])
            begin = end
    return b"".join([*kept, data[begin:]]) if begin else data


def text_of(data: bytes, keyword: str) -> str:
    """Returns the international text of a PNG under a keyword if it is short and not packed, else nothing."""
    head = keyword.encode("latin-1") + b"\0\0"  # the second byte says that it is not packed
    for kind, start, end in _chunks(data) if data.startswith(_SIGNATURE) else ():
        if kind == b"iTXt" and data.startswith(head, start + 8) and end - start <= _MOST_TEXT:
            _, _, text = data[start + 8 + len(head) + 1 : end - 4].partition(b"\0")[2].partition(b"\0")
            return text.decode("utf-8", "replace")
    return ""


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind of each chunk, and where it begins and ends."""
    start = len(_SIGNATURE)
    while start + _AROUND <= len(data):
        end = start + _AROUND + int.from_bytes(data[start : start + 4])
        yield data[start + 4 : start + 8], start, end
        start = end


def _unpacks_beyond(profile: bytes, most: int) -> bool:
    """Returns whether a profile, which stands packed behind its name, is larger than `most` bytes."""
    if len(profile) * _MOST_DEFLATED <= most:
        return False
    _, _, packed = profile.partition(b"\0")
    try:
        return len(zlib.decompressobj().decompress(packed[1:], most + 1)) > most
    except zlib.error:
        return False
