"""What a sample prompt may say of its picture: the bounds that files of prompts and the cache of them share."""

from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

SIDE_STEP_PX = 16  # the VAE divides a side by 8, the MMDiT's patches by 2 more
MOST_SIDE_PX = 4096

Steps = Annotated[int, Field(ge=1, le=1000)]
Scale = Annotated[float, Field(ge=0, lt=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_WholeSide = Annotated[int, Field(ge=SIDE_STEP_PX, le=MOST_SIDE_PX, multiple_of=SIDE_STEP_PX)]


@with_config(extra="forbid", strict=True)
class PromptSettings(TypedDict, total=False):
    """What the cache keeps of a prompt beside its texts; a key is missing where the model's variant decides."""

    width: _WholeSide
    height: _WholeSide
    steps: Steps
    scale: Scale
    seed: Seed
