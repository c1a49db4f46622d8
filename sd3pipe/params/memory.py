"""Types of the memory options that several commands share."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from sd3pipe.rules.memory import Blocks, RecomputedBlocks, check_size, parse_blocks, parse_recomputed

BlocksToSwap = Annotated[Blocks, BeforeValidator(parse_blocks)]
BlocksToRecompute = Annotated[RecomputedBlocks, BeforeValidator(parse_recomputed)]
Size = Annotated[str, AfterValidator(check_size)]
