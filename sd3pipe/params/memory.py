"""Types of the memory options that several commands share."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field


def _blocks(value: Any) -> Any:
    """Returns the number in a command line's text; "auto" stays."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value) else value


BlocksToSwap = Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], BeforeValidator(_blocks)]
