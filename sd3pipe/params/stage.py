"""Options that several commands have, each declared once, and the types of their values."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from sd3pipe.params.fields import OptionPath, Params, option
from sd3pipe.rules.memory import Blocks, RecomputedBlocks, check_size, parse_blocks, parse_recomputed
from sd3pipe.words import Engine, Goal

CHECKPOINTS = r"^(all|every:[1-9]\d*|\d+(,\d+)*)$"
NUMBERS, INTEGERS = r"^-?\d+(\.\d+)?(,-?\d+(\.\d+)?)*$", r"^\d+(,\d+)*$"
_OTHER_GOALS = {"subject": "object", "concepts": "concept"}


def shard_of_process(shard: str | None) -> tuple[int, int]:
    """Returns (this part, number of parts): what --shard says, else this process's rank under torchrun, else all."""
    if shard is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    part, parts = shard.split("/")
    return int(part), int(parts)


def _part_exists(shard: str) -> str:
    part, parts = shard_of_process(shard)
    if part >= parts:
        raise ValueError(f"there is no part {part} of {parts}: count from 0 to {parts - 1}")
    return shard


BlocksToSwap = Annotated[Blocks, BeforeValidator(parse_blocks)]
BlocksToRecompute = Annotated[RecomputedBlocks, BeforeValidator(parse_recomputed)]
Size = Annotated[str, AfterValidator(check_size)]
AnyGoal = Annotated[Goal, BeforeValidator(lambda word: _OTHER_GOALS.get(word, word) if isinstance(word, str) else word)]
Shard = Annotated[str, AfterValidator(_part_exists)]

# fmt: off
MMDIT: Any = option(
    None, "MMDiT in a file of its own; beats the one in --model.", role="path", panel="Paths", advanced=True
)
TOLD_VARIANT: Any = option(
    None, "Draw with the turbo model's steps and scale; nothing else tells it from large.", panel="Drawing"
)
SHARD: Any = option(
    None, "I/N: do only the I-th of N parts (I from 0); whoever finds the cache complete publishes it. Default: this "
    "process's rank under torchrun, else all.", panel="This run", advanced=True, pattern=r"^\d+/[1-9]\d*$",
)
ENGINE: Any = option(
    "local", "Who encodes: this process, or the workers of a Ray cluster (pip install \"sd3pipe[ray]\"), which "
    "RAY_ADDRESS names or which is started here.", panel="This run", advanced=True,
)
RAY_WORKERS: Any = option(
    None, "Ray's workers, each with its encoders. Default: one for each GPU, or for each machine without any. For "
    "several on one machine's cores pass --threads, too.", panel="This run", advanced=True, ge=1,
)


def base_model(default: Any) -> Any:
    """Declares --model where it names what is trained or drawn with; `...` makes it required."""
    return option(
        default, "Base model: a .safetensors file, a diffusers folder or a hub id.",
        role="path", panel="Paths", paths_key="model", aliases=("pretrained_model_name_or_path",),
    )


def mixed_precision(panel: str) -> Any:
    """Declares --mixed-precision of a command that draws or measures."""
    return option(
        "auto", "Number format of the model; auto: bf16 or, on older cards, fp16 on CUDA; float32 on the CPU.",
        panel=panel,
    )


def blocks_to_swap(panel: str) -> Any:
    """Declares --blocks-to-swap of a command that draws or measures."""
    return option(
        "auto", "Blocks that stay in host memory and visit the device; auto: as few as fit, on CUDA; none on the CPU.",
        panel=panel, advanced=True,
    )
# fmt: on


class StageParams(Params):
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:N.", panel="Machine")
    threads: int | None = option(None, "CPU threads to compute with; default: all cores.", panel="Machine", ge=1)


class ModelParams(StageParams):
    model: str = base_model(...)
    mmdit: OptionPath | None = MMDIT


def check_engine(engine: Engine, shard: str | None, ray_workers: int | None) -> None:
    """Raises ValueError for options that say something else than --engine."""
    if engine == "local" and ray_workers is not None:
        raise ValueError("--ray-workers is for --engine ray: pass it, too, or use --shard")
    if engine == "ray" and shard is not None:
        raise ValueError("--engine ray shares out the work by itself: leave --shard out")


def no_value_twice(value: str | None) -> str | None:
    """Returns numbers separated by commas as they are. Raises ValueError for one that stands there twice."""
    numbers = [float(number) for number in value.split(",")] if value else []
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{value} names a value twice")
    return value
