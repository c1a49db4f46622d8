"""How the base is kept and computed with: what fits a card, and what is quick on it."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from sd3pipe.rules.declaring import rule
from sd3pipe.words import AttentionKernel, MatmulFormat, ModulationMode, PackedFormat

_UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}

# fmt: off


def parse_blocks(value: Any) -> Any:
    """Returns the number in a command line's text; "auto" stays."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value) else value


def parse_recomputed(value: Any) -> Any:
    """Returns "on" or "off" for a switch, as which the option may be written, and the number in a text."""
    word = value.strip().lower() if isinstance(value, str) else value
    switched = {True: "on", "true": "on", False: "off", "false": "off", "0": "off"}
    return switched.get(word, parse_blocks(value)) if isinstance(word, (bool, str, int)) else value


def check_size(value: str) -> str:
    """Returns an amount of memory as it stands. Raises ValueError where it is none."""
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*([GM](I?B)?)?\s*", value, flags=re.IGNORECASE):
        raise ValueError("write a size such as 12GB or 24GiB")
    return value


def size_bytes(text: str) -> int:
    """Returns the bytes of a size; a bare number counts gigabytes."""
    number = re.sub("[A-Za-z ]", "", text)
    return int(float(number) * _UNITS[text.replace(number, "").strip().upper()])


def _check_host_memory(value: Any) -> Any:
    return value if value == "auto" or not isinstance(value, str) else check_size(value)


Blocks = Annotated[int, Ge(0)] | Literal["auto"]
RecomputedBlocks = Annotated[int, Ge(1)] | Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRules:
    """Where weights and activations of the base wait."""

    gradient_checkpointing: RecomputedBlocks = rule(
        "auto", "Recompute activations in the backward pass instead of keeping them: in all blocks (on), none (off) "
        "or so many; auto: in as few as fit.", parse=parse_recomputed, switch=True,
    )
    base_dtype: PackedFormat | None = rule(
        None, "Keep the base's blocks packed: fp8 scaled, int8 or nf4; default: as mixed_precision says.",
        role="identity", advanced=True,
    )
    matmul_dtype: MatmulFormat | None = rule(
        None, "Take the base's own products in 8 bits, whose weights are kept so: int8, or fp8 on newer cards.",
        role="identity", advanced=True,
    )
    matmul_rotation: bool | None = rule(
        None, "Rotate what is multiplied in 8 bits, against channels much larger than others; default: with int8.",
        role="identity", advanced=True,
    )
    blocks_to_swap: Blocks = rule(
        "auto", "Blocks that stay in host memory and visit the device; auto: as few as fit, on CUDA; none on the CPU.",
        parse=parse_blocks,
    )
    host_memory: str = rule(
        "auto", "Memory of the host to use, such as 16GB: swapped blocks beyond it are read from the file in every "
        "step; auto: what is free.", parse=_check_host_memory, advanced=True,
    )
    modulation: ModulationMode = rule(
        "stream", "Where swapped blocks' adaLN weights are used: streamed, kept on the device, or on the host ahead.",
        advanced=True,
    )
    activation_offload: bool = rule(
        False, "Let the inputs of recomputed blocks wait in host memory.", advanced=True
    )
    layer_major: bool = rule(
        False, "Take all accumulated batches through a block before the next one is fetched; same result.",
        advanced=True,
    )


    @property
    def host_bytes(self) -> int | None:
        """The bound of host memory; None: what is free."""
        return None if self.host_memory == "auto" else size_bytes(self.host_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsRules:
    """Which kernels compute."""

    tf32: bool = rule(
        True, "Let CUDA round the factors of float32 products to TF32; off under deterministic.", advanced=True
    )
    sdpa_backend: AttentionKernel = rule(
        "auto", "Kernel of the attention; auto: torch takes the quickest that fits the card.", advanced=True
    )
    torch_compile: bool | None = rule(
        None, "Compile the joint blocks, one graph for each shape of block; default: with CUDA and a C compiler, in "
        "runs of 500 steps or more, unless deterministic.", advanced=True,
    )
    deterministic: bool = rule(
        False, "Equal bits on CUDA, too, at equal device and libraries; slower.", advanced=True
    )
