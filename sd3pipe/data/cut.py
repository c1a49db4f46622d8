"""What is cut out of a picture for one row: resized size, crop, flip, mask. A worker needs no more."""

from dataclasses import dataclass
from typing import Any, Literal

Size = tuple[int, int]  # width, height
MaskSource = Literal["alpha", "picture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One row's view of a picture, in pixels: resize to `resized`, take `size` from (left, top), then maybe mirror."""

    resized: Size
    left: int
    top: int
    size: Size
    flip: bool
    resize_filter: str | None
    mask: MaskSource | None
    background: tuple[int, int, int] | None

    def recipe(self) -> dict[str, Any]:
        """Returns the JSON that stands for this cut in a row's key."""
        return {
            "resized": list(self.resized),
            "crop": [self.left, self.top, *self.size],
            "flip": self.flip,
            "filter": self.resize_filter,
            "mask": self.mask,
            "background": list(self.background) if self.background else None,
        }
