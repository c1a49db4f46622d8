"""What is done to the tags of a caption, line by line. A caption is text; nothing else about it changes."""

from collections.abc import Callable, Mapping, Sequence

Operation = Callable[[list[str], str, str], list[str]]


def edited(caption: str, operation: str, tag: str, other: str = "", *, separator: str = ",") -> str:
    """Returns a caption after an operation of `OPERATIONS`. Tags are compared without regard to upper and lower case.

    A line that the operation leaves alone stays as it is, blanks and all.
    """
    if not caption.strip():
        return _joined(OPERATIONS[operation]([], tag.strip(), other.strip()), separator) or caption
    return "\n".join(_line(line, operation, tag.strip(), other.strip(), separator) for line in caption.split("\n"))


def _line(line: str, operation: str, tag: str, other: str, separator: str) -> str:
    if not line.strip():
        return line
    tags = [part.strip() for part in (line.split(separator) if separator else [line]) if part.strip()]
    after = OPERATIONS[operation](list(tags), tag, other)
    return line if after == tags else _joined(after, separator)


def _joined(tags: Sequence[str], separator: str) -> str:
    mark = separator if not separator or separator[-1].isspace() else f"{separator} "
    return (mark or " ").join(tags)


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _without(tags: list[str], tag: str) -> list[str]:
    return [other for other in tags if not _same(other, tag)]


def _add(tags: list[str], tag: str, other: str) -> list[str]:
    return tags if any(_same(one, tag) for one in tags) else [*tags, tag]


def _remove(tags: list[str], tag: str, other: str) -> list[str]:
    return _without(tags, tag)


def _replace(tags: list[str], tag: str, other: str) -> list[str]:
    if not any(_same(one, tag) for one in tags):
        return tags
    return _dedupe([other if _same(one, tag) else one for one in tags], "", "") if other else _without(tags, tag)


def _front(tags: list[str], tag: str, other: str) -> list[str]:
    there = [one for one in tags if _same(one, tag)]
    return [*there[:1], *_without(tags, tag)] if there else tags


def _dedupe(tags: list[str], tag: str, other: str) -> list[str]:
    first: dict[str, str] = {}
    for one in tags:
        first.setdefault(one.casefold(), one)
    return list(first.values())


OPERATIONS: Mapping[str, Operation] = {
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "front": _front,
    "dedupe": _dedupe,
}
