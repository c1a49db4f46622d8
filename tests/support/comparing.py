"""How tests compare what they find with what they expect."""

from pathlib import Path
from typing import Any


def relative_error(found: Any, expected: Any) -> float:
    """Returns the distance of two tensors as a share of the expected one's length."""
    return ((found - expected).norm() / expected.norm()).item()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
