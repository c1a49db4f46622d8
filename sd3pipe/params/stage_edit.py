"""Changes single keys of a stage's parameter file and leaves every other byte as it stands, comments included.

The file is edited as lines; what comes out is read again, and has to say just what was asked, else nothing is changed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sd3pipe.config import flatten
from sd3pipe.documents import DocumentError, parse_toml
from sd3pipe.errors import ParameterError
from sd3pipe.params.stage_file import toml_value


def edited_stage_file(text: str, changes: Mapping[str, Any], spellings: Mapping[str, str], where: str) -> str:
    """Returns the text with each option of `changes` at its value, or commented out where that is None.

    `spellings` maps every key that a file may have to the option that it stands for. Raises ParameterError.
    """
    before = _values(text, spellings, where)
    for name, value in changes.items():
        keys = [key for key, option in spellings.items() if option == name]
        lines = text.split("\n")
        text = "\n".join(_without(lines, keys) if value is None else _with(lines, keys, name, value))
    values = {name: value for name, value in {**before, **changes}.items() if value is not None}
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    try:
        after = _values(text, spellings, where)
    except DocumentError:
        after = {}
    if after != wanted:
        raise ParameterError(f"{where}: {', '.join(changes)}: stands there in a way that only an editor changes")
    return text


def _values(text: str, spellings: Mapping[str, str], where: str) -> dict[str, Any]:
    found = [(spellings.get(key, key), value) for key, value in flatten(parse_toml(text, where))]
    values = dict(found)
    if len(values) < len(found):
        raise DocumentError(f"{where}: a key is set twice")
    return values


def _with(lines: Sequence[str], keys: Sequence[str], name: str, value: Any) -> list[str]:
    """Puts a value where the key stands, else where it stands as a comment, else in front of the first table."""
    span = _span(lines, keys)
    if span is not None:
        start, end = span
        key = re.split(r"\s*=", lines[start], maxsplit=1)[0]
        return [*lines[:start], f"{key} = {toml_value(value)}{_comment(lines[start:end])}", *lines[end:]]
    new = f"{name} = {toml_value(value)}"
    as_comment = re.compile(rf"#\s*{re.escape(name)}\s*=(?!.*# left out)")
    first_table = next((number for number, line in enumerate(lines) if re.match(r"\s*\[", line)), len(lines))
    for number, line in enumerate(lines):
        if as_comment.match(line) and not _in_kept_table(lines, number):
            return [*lines[:number], new, *lines[number + 1 :]]
    at = first_table if first_table < len(lines) else len(lines) - (1 if lines and not lines[-1] else 0)
    return [*lines[:at], new, *lines[at:]]


def _without(lines: Sequence[str], keys: Sequence[str]) -> list[str]:
    span = _span(lines, keys)
    if span is None:
        return list(lines)
    start, end = span
    return [*lines[:start], *(f"# {line}" for line in lines[start:end]), *lines[end:]]


def _in_kept_table(lines: Sequence[str], at: int) -> bool:
    heads = [line.strip() for line in lines[:at] if re.match(r"\s*\[", line)]
    return bool(heads) and heads[-1].startswith("[subsets")


def _span(lines: Sequence[str], keys: Sequence[str]) -> tuple[int, int] | None:
    """Returns the first and the last line of a key's value, which may go over several lines."""
    is_key = re.compile(rf"\s*(?:{'|'.join(map(re.escape, keys))})\s*=")
    for start, line in enumerate(lines):
        if is_key.match(line) and not _in_kept_table(lines, start):
            for end in range(start + 1, len(lines) + 1):
                if _is_toml("\n".join(lines[start:end])):
                    return start, end
    return None


def _comment(lines: Sequence[str]) -> str:
    """Returns the comment behind a value with the blanks before it."""
    last = lines[-1]
    for match in re.finditer(r"\s*#", last):
        if _is_toml("\n".join([*lines[:-1], last[: match.start()]])):
            return last[match.start() :]
    return ""


def _is_toml(text: str) -> bool:
    try:
        parse_toml(text, "part")
    except DocumentError:
        return False
    return True
