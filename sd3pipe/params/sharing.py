"""The options by which the encode stages share out their work: --shard, --engine and --ray-workers."""

import os
from typing import Annotated

from pydantic import AfterValidator

from sd3pipe.words import Engine


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


Shard = Annotated[str, AfterValidator(_part_exists)]
SHARD_PATTERN = r"^\d+/[1-9]\d*$"
SHARD_HELP = (
    "I/N: do only the I-th of N parts (I from 0); whoever finds the cache complete publishes it. Default: this "
    "process's rank under torchrun, else all."
)

ENGINE_HELP = (
    "Who encodes: this process, or the workers of a Ray cluster (pip install 'sd3pipe[ray]'), which RAY_ADDRESS names "
    "or which is started here."
)
WORKERS_HELP = (
    "Ray's workers, each with its encoders. Default: one for each GPU, or for each machine without any. For several on "
    "one machine's cores pass --threads, too."
)


def check_engine(engine: Engine, shard: str | None, ray_workers: int | None) -> None:
    """Raises ValueError for options that say something else than --engine."""
    if engine == "local" and ray_workers is not None:
        raise ValueError("--ray-workers is for --engine ray: pass it, too, or use --shard")
    if engine == "ray" and shard is not None:
        raise ValueError("--engine ray shares out the work by itself: leave --shard out")
