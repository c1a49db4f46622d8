"""The option --shard of the encode stages: which part of the work this process does."""

import os
from typing import Annotated

from pydantic import AfterValidator


def _part_exists(value: str) -> str:
    part, parts = shard_numbers(value)
    if part >= parts:
        raise ValueError(f"there is no part {part} of {parts}: count from 0 to {parts - 1}")
    return value


def shard_numbers(text: str) -> tuple[int, int]:
    """Returns (this part, number of parts) of 'I/N'."""
    part, parts = text.split("/")
    return int(part), int(parts)


def shard_of_process(shard: str | None) -> tuple[int, int]:
    """Returns (this part, number of parts): what --shard says, else this process's rank under torchrun, else all."""
    if shard is not None:
        return shard_numbers(shard)
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


SHARD_PATTERN = r"^\d+/[1-9]\d*$"
SHARD_HELP = (
    "I/N: do only the I-th of N parts (I from 0); whoever finds the cache complete publishes it. Default: this "
    "process's rank under torchrun, else all."
)
Shard = Annotated[str, AfterValidator(_part_exists)]
