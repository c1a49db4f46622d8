"""What is found out about a picture without decoding it: its hash and what its header says, or why it is useless."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sd3pipe import stopping
from sd3pipe.data.places import Place, read_picture
from sd3pipe.errors import UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_bytes, is_hash

Finding = Mapping[str, Any]  # hash, width, height, has_alpha, animated; or unreadable, with decoder and maybe hash


def find_out(place: Place, stamps: FileStamps) -> Finding:
    """Returns what there is to know of a picture file, as remembered where possible."""
    known = remembered(stamps.recall(place.file, "picture"))
    if known is not None:
        return known
    known = look_into(place)
    if known.get("hash"):
        stamps.remember(place.file, "picture", known)
    return known


def look_into(place: Place) -> Finding:
    """Returns what there is to know of a picture by its bytes, where they lie."""
    stopping.check()
    try:
        data = read_picture(place)
    except UnreadablePicture as error:
        return {"unreadable": str(error)}
    return finding_of(data, place.suffix)


def finding_of(data: bytes, suffix: str) -> Finding:
    """Returns what there is to know of a picture with these bytes."""
    from sd3pipe.data.headers import read_header  # imports Pillow, which a second scan does not need

    try:
        return {"hash": hash_bytes(data), **asdict(read_header(data, suffix))}
    except UnreadablePicture as error:
        return {"hash": hash_bytes(data), "unreadable": str(error), "decoder": decoder()}


def remembered(known: object) -> Finding | None:
    """Returns what was remembered about a picture if it is what `finding_of` returns here."""
    if not isinstance(known, dict) or not is_hash(known.get("hash")):
        return None
    if isinstance(known.get("unreadable"), str):
        return known if known.get("decoder", decoder()) == decoder() else None
    sides, flags = (known.get("width"), known.get("height")), (known.get("has_alpha"), known.get("animated"))
    fits = all(type(side) is int and side > 0 for side in sides) and all(type(flag) is bool for flag in flags)
    return known if fits else None


@functools.cache
def decoder() -> str:
    """Returns the versions of Pillow and its plugins: others may read what these do not."""
    versions = [_version(package) for package in ("pillow", "pillow-heif", "pillow-jxl-plugin")]
    return " ".join(filter(None, versions))


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
