"""What pydantic finds wrong with a value or a table that a person wrote, in sentences, with the nearest known word."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound="BaseModel")

_SHOWN_LENGTH = 60


def nearest(word: str, known: Collection[str]) -> str:
    """Returns ' (did you mean X?)' for the nearest known word, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def reason(item: "ErrorDetails") -> str:
    """Returns one of pydantic's problems as a sentence about the value before it."""
    words = item["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("Input must", "must")
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return words
    return words + nearest(item["input"], re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", "")))


def check_table(
    kind: type[M],
    values: Mapping[str, Any],
    *,
    explain: Callable[[str], str | None] = lambda key: None,
    strict: bool | None = None,
) -> tuple[M | None, dict[str, str]]:
    """Returns a table as a model, or None, and one line for each key that cannot be used: 'key = value: must be ...'.

    `explain` says more of a key that the model does not have, if there is more to say.
    """
    from pydantic import ValidationError  # takes 100 ms; `sd3pipe --help` may import this module

    known = {key: value for key, value in values.items() if key in kind.model_fields}
    problems = {
        key: f"{shown_key(key)}: {explain(key) or f'unknown key{nearest(key, kind.model_fields)}'}"
        for key in values
        if key not in known
    }
    try:
        return kind.model_validate(known, strict=strict), problems
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            words = f"{key} = {shown(known[key])}: {reason(item)}" if key in known else f"{key}: is missing"
            problems.setdefault(key, words)
        return None, problems


def shown(value: Any) -> str:
    """Returns a value as it can stand in a message: on one line, cut if it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "..."


def shown_key(key: str) -> str:
    """Returns a key as it can stand on one line."""
    return key if key.isprintable() and key else ascii(key)
