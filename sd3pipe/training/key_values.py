"""What an optimizer's and a schedule's words of the form key=value say. Free of torch."""

import ast
from collections.abc import Sequence

from sd3pipe.errors import ParameterError


def parse_args(option: str, args: Sequence[str]) -> dict[str, object]:
    """Returns key=value pairs with the values read as Python literals. Raises ParameterError."""
    parsed: dict[str, object] = {}
    for arg in args:
        key, separator, value = arg.partition("=")
        if not separator:
            raise ParameterError(f"{option}: {arg}: write key=value")
        try:
            parsed[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ParameterError(f"{option}: {arg}: {value!r} is not a number, True, False, None or a tuple") from error
    return parsed
