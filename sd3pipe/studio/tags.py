"""What is done to the tags of a caption, line by line. A caption is text; nothing else about it changes."""

from collections.abc import Sequence

OPERATIONS = ("add", "remove", "replace", "front", "dedupe")


def edited(caption: str, operation: str, tag: str, other: str = "", *, separator: str = ",") -> str:
    """Returns a caption after an operation of `OPERATIONS`. Tags are compared without regard to upper and lower case.

    A line that the operation leaves alone stays as it is, blanks and all.
    """
    if not caption.strip():
        return _joined(_changed([], operation, tag.strip(), other.strip()), separator) or caption
    lines = []
    for line in caption.split("\n"):
        tags = [part.strip() for part in (line.split(separator) if separator else [line]) if part.strip()]
        after = _changed(tags, operation, tag.strip(), other.strip()) if line.strip() else tags
        lines.append(line if after == tags else _joined(after, separator))
    return "\n".join(lines)


def _changed(tags: list[str], operation: str, tag: str, other: str) -> list[str]:
    there = [one for one in tags if one.casefold() == tag.casefold()]
    others = [one for one in tags if one.casefold() != tag.casefold()]
    match operation:
        case "add":
            return tags if there else [*tags, tag]
        case "front":
            return [*there[:1], *others] if there else tags
        case "replace" if other:
            return _without_repeats([other if one in there else one for one in tags]) if there else tags
        case "dedupe":
            return _without_repeats(tags)
    return others


def _without_repeats(tags: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for one in tags:
        first.setdefault(one.casefold(), one)
    return list(first.values())


def _joined(tags: Sequence[str], separator: str) -> str:
    mark = separator if not separator or separator[-1].isspace() else f"{separator} "
    return (mark or " ").join(tags)
