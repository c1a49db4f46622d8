"""Writes docs/python.md: the functions that others may call, with the signatures and sentences of the code."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.vae import VAE
from sd3pipe.training.flow import add_noise, loss

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
FUNCTIONS = (load_mmdit, load_vae, MMDiT.forward, VAE.encode, VAE.decode, add_noise, loss)
HEADING = "## The functions\n"


def page() -> str:
    """Returns the whole page: the text above the heading as it stands, and the functions made anew."""
    above = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    return above + HEADING + "".join(map(described, FUNCTIONS))


def described(function: Callable[..., Any]) -> str:
    """Returns the section of one function."""
    signature = re.sub(r"(?:\w+\.)+(\w+)", r"\1", str(inspect.signature(function)))
    name, text = function.__qualname__, inspect.cleandoc(function.__doc__ or "")
    return f"\n### {name}\n\n```text\n{function.__module__}.{name}{signature}\n```\n\n{text}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
