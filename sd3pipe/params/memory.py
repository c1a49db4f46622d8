"""Types of the memory options that several commands share."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from sd3pipe.rules.memory import Blocks, RecomputedBlocks, parse_blocks, parse_recomputed

_UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}


def _size(value: str) -> str:
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*([GM](I?B)?)?\s*", value, flags=re.IGNORECASE):
        raise ValueError("write a size such as 12GB or 24GiB")
    return value


BlocksToSwap = Annotated[Blocks, BeforeValidator(parse_blocks)]
BlocksToRecompute = Annotated[RecomputedBlocks, BeforeValidator(parse_recomputed)]
Size = Annotated[str, AfterValidator(_size)]


def size_bytes(text: str) -> int:
    """Returns the bytes of a Size; a bare number counts gigabytes."""
    number = re.sub("[A-Za-z ]", "", text)
    return int(float(number) * _UNITS[text.replace(number, "").strip().upper()])
