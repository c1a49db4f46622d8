"""Names of the resize filters. Apart from resize.py, so that keys can be computed without numpy."""

_SAME = {"linear": "bilinear", "cubic": "bicubic"}


def filter_name(width: int, height: int, size: tuple[int, int], interpolation: str | None) -> str:
    """Returns the filter that brings a picture to `size` (width, height); it enters the key of a row.

    Without an `interpolation`, a picture that shrinks or stays on both sides is averaged over areas, any other goes
    through Lanczos. As soon as one side grows, OpenCV's area is another filter than its name says: area-blend.
    """
    grows = width < size[0] or height < size[1]
    if interpolation is None:
        return "lanczos" if grows else "area"
    if interpolation == "area" and grows:
        return "area-blend"
    return _SAME.get(interpolation, interpolation)
