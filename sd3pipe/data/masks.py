"""Which mask belongs to which picture: that of its file's name, in the same folders as far as there are such."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3pipe.console import count, listed, one_line
from sd3pipe.data.folders import CaptionError, FoundFile, is_picture_name, walked
from sd3pipe.data.places import Place


def masks_of(entries: Iterable[FoundFile], folder: Path) -> dict[str, Place]:
    """Returns the masks that lie below a conditioning_data_dir, by the names of their pictures. Raises CaptionError.

    The mask of a/1.png is a/1 there with any ending, else 1: sd-scripts goes by the file's own name alone.
    """
    lying: dict[str, list[Path]] = defaultdict(list)
    for prefix, here, files, _ in walked(folder, recursive=True):
        for name in sorted(filter(is_picture_name, files)):
            lying[prefix + Path(name).stem].append(here / name)
    masks: dict[str, Place] = {}
    for entry in entries:
        found = next((lying[path] for path in _ends(entry) if path in lying), [])
        if len(found) > 1:
            here, names = found[0].parent, " and ".join(file.name for file in found)
            raise CaptionError(f"{one_line(str(here))}: {names} are masks of one picture: keep one")
        if found:
            masks[entry.name] = Place(found[0])
    return masks


def one_mask_of_several(masked: Iterable[tuple[Place, str, str]]) -> str | None:
    """Returns what is wrong where pictures that differ have one mask: of each its mask, name and hash."""
    by_mask: dict[Place, dict[str, str]] = defaultdict(dict)
    for mask, name, image_hash in masked:
        by_mask[mask].setdefault(image_hash, name)
    several = [(mask, list(names.values())) for mask, names in by_mask.items() if len(names) > 1]
    if not several:
        return None
    mask, names = several[0]
    rest = f" (as do those of {count(len(several) - 1, 'further mask')})" if len(several) > 1 else ""
    return (
        f"{one_line(str(mask))}: would be the mask of {one_line(listed(names, most=3))}, which differ{rest}: "
        "give the pictures names of their own, or let masks lie in sub-folders that are called as the pictures' are"
    )


def mask_problem(picture: Mapping[str, Any], mask: Mapping[str, Any]) -> str | None:
    """Returns why a mask is of no use for its picture, by what was found out about both."""
    if mask.get("unreadable"):
        return f"its mask cannot be used: {mask['unreadable']}"
    if (mask["width"], mask["height"]) != (picture["width"], picture["height"]):
        return (
            f"its mask has {mask['width']} x {mask['height']} pixels, but it has "
            f"{picture['width']} x {picture['height']}"
        )
    return None


def _ends(entry: FoundFile) -> Iterator[str]:
    """Yields the ends of a picture's path, without the ending of its file, the longest first."""
    folders = entry.name.split("/")[:-1]
    for start in range(len(folders) + 1):
        yield "/".join((*folders[start:], entry.place.stem))
