"""Checks one value of a dataset file against what its key may hold."""

import math
from typing import Any

from sd3pipe.data.dataset_keys import Key

_SHOWN_LENGTH = 60
_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}


def check_value(key: Key, value: Any) -> tuple[str | None, Any]:
    """Returns (problem, None) or (None, the value in its final type)."""
    problem, checked = _CHECKS[key.kind](value)
    problem = problem or _out_of_range(key, checked)
    if problem is None and key.choices and checked not in key.choices:
        problem = f"must be one of {', '.join(key.choices)}"
    return (problem, None) if problem else (None, checked)


def _out_of_range(key: Key, checked: Any) -> str | None:
    numbers = checked if isinstance(checked, tuple) else (checked,)
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    if key.minimum is not None and min(numbers) < key.minimum:
        return f"must be at least {key.minimum:g}"
    if key.maximum is not None and max(numbers) > key.maximum:
        return f"must be at most {key.maximum:g}"
    return None


def shown_value(value: Any) -> str:
    """Returns a value as it can stand in a message: on one line, cut if it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _bool(value: Any) -> tuple[str | None, Any]:
    return (None, value) if isinstance(value, bool) else ("must be true or false", None)


def _int(value: Any) -> tuple[str | None, Any]:
    return (None, value) if _is_int(value) else ("must be a whole number", None)


def _number(value: Any) -> tuple[str | None, Any]:
    return (None, float(value)) if _is_number(value) else ("must be a number", None)


def _str(value: Any) -> tuple[str | None, Any]:
    if not isinstance(value, str):
        return "must be a string in quotes", None
    if "\0" in value:
        return "must not hold a NUL character", None
    return None, value


def _size(value: Any) -> tuple[str | None, Any]:
    if _is_int(value):
        return None, (value, value)
    if isinstance(value, list) and len(value) == 2 and all(_is_int(side) for side in value):
        return None, (value[0], value[1])
    return "must be a whole number or [width, height]", None


def _range(value: Any) -> tuple[str | None, Any]:
    if isinstance(value, list) and len(value) == 2 and all(_is_number(side) for side in value):
        low, high = float(value[0]), float(value[1])
        return (None, (low, high)) if 0 < low <= high else ("must be two rising numbers above 0", None)
    return "must be [low, high]", None


def _extensions(value: Any) -> tuple[str | None, Any]:
    if isinstance(value, str) and value and "/" not in value and "\0" not in value:
        return None, (value,)
    return "must be an ending such as '.txt'", None


def _colour(value: Any) -> tuple[str | None, Any]:
    if isinstance(value, str) and value in _COLOURS:
        return None, _COLOURS[value]
    if isinstance(value, list) and len(value) == 3 and all(_is_int(part) and 0 <= part <= 255 for part in value):
        return None, tuple(value)
    return f"must be {', '.join(_COLOURS)} or [red, green, blue] from 0 to 255", None


def _table(value: Any) -> tuple[str | None, Any]:
    return (None, value) if isinstance(value, dict) else ("must be a table", None)


_CHECKS = {
    "bool": _bool,
    "int": _int,
    "number": _number,
    "str": _str,
    "size": _size,
    "range": _range,
    "extensions": _extensions,
    "colour": _colour,
    "table": _table,
}
