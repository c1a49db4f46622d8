"""Options of memory and speed, which every command that runs the MMDiT shares."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sd3pipe.params.fields import Params, option

_MEMORY = "Memory and speed"


def _blocks(value: Any) -> Any:
    """Returns the number in a command line's text; "auto" stays."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value) else value


BlocksToSwap = Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], BeforeValidator(_blocks)]


class MemoryParams(Params):
    blocks_to_swap: BlocksToSwap = option(
        "auto",
        "Joint blocks whose weights stay on the host and are copied ahead of their use; auto: as few as fit, on CUDA.",
        panel=_MEMORY,
    )
    modulation: Literal["stream", "resident", "ahead"] | None = option(
        None,
        "Where the adaLN weights of streamed blocks are: copied with them, kept on the device, or used on the host "
        "(one step ahead). Default: stream, or what auto chooses.",
        panel=_MEMORY,
        advanced=True,
    )
    base_format: Literal["dense", "fp8", "int8", "nf4"] = option(
        "dense",
        "How the frozen attention and MLP weights are stored; nf4 needs bitsandbytes.",
        role="identity",
        panel=_MEMORY,
    )
    cpu_offload_checkpointing: bool = option(
        False, "Keep the inputs of recomputed blocks on the host until the backward pass.", panel=_MEMORY
    )
    layer_major: bool = option(
        False,
        "With gradient accumulation, run all micro-batches through a block before the next one is fetched.",
        panel=_MEMORY,
        advanced=True,
    )
    torch_compile: bool = option(
        False, "Compile the joint blocks, one graph for each block shape.", panel=_MEMORY, advanced=True
    )
    tf32: bool = option(True, "Let CUDA round the inputs of float32 products to TF32.", panel=_MEMORY, advanced=True)
