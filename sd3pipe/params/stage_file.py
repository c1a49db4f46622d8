"""Writes a stage's parameter file from its option set: what people change first, the rest commented out."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from sd3pipe.errors import ParameterError
from sd3pipe.params.fields import Params, option_extra

_WIDTH = 118
_NOT_OF_A_PROJECT = {  # of a machine, or of one call
    "device", "threads", "dry_run", "shard", "engine", "ray_workers", "rehash", "verify_weights", "stale_ok", "resume",
    "allow_changes", "time_limit",
}  # fmt: skip


def render_stage_file(
    model: type[Params],
    command: str,
    values: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    left_out: Mapping[str, Sequence[tuple[Any, str]]] | None = None,
) -> str:
    """Returns the text of stages/COMMAND.toml.

    `values` replaces defaults, `notes` adds a line (a value's source) above a key, `left_out` has values that are shown
    commented out with the reason. Common options stand with their values; advanced ones, and those without a value, are
    commented out. Paths are left to project.toml unless there is a value.
    """
    values, notes, left_out = values or {}, notes or {}, left_out or {}
    named = {*values, *left_out}
    lines = [
        f"# Options of `sd3pipe {command}`; a key is an option's full name (`sd3pipe {command} --help-all`).",
        "# Commented lines show defaults. Paths stand in project.toml.",
    ]
    fields = {name: field for name, field in model.model_fields.items() if name in named or belongs(name, field)}
    for panel in dict.fromkeys(option_extra(field)["panel"] for field in fields.values()):
        lines += ["", f"# {panel}"]
        for name, field in fields.items():
            if option_extra(field)["panel"] == panel:
                lines += _entry(name, field, values, notes)
                lines += [left_out_line(name, *item) for item in left_out.get(name, ())]
    return "\n".join(lines) + "\n"


def left_out_line(key: str, value: Any, reason: str) -> str:
    """Returns a line that keeps a value as a comment, with why it does not count."""
    return f"# {key} = {toml_value(value)} # left out: {reason}"


def toml_value(value: Any) -> str:
    """Returns a value as TOML text. Raises ParameterError for a file's name that is no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    escaped = "".join(_escaped(char, value) for char in str(value))
    return f'"{escaped}"'


def _escaped(char: str, value: object) -> str:
    if char in '"\\':
        return "\\" + char
    if "\ud800" <= char <= "\udfff":  # how Python holds a byte of a name that is not UTF-8
        raise ParameterError(f"{value!a}: is not UTF-8 text, which TOML wants: rename that file or folder")
    return char if char.isprintable() else f"\\U{ord(char):08X}"


def belongs(name: str, field: FieldInfo) -> bool:
    """Returns whether an option has a place in a project's file: it is none of a machine's, a path, or typed alone."""
    return (
        option_extra(field)["role"] != "path"
        and name not in _NOT_OF_A_PROJECT
        and option_extra(field)["trust"] != "typed"
        and not option_extra(field)["positional"]
    )


def _entry(name: str, field: FieldInfo, values: Mapping[str, Any], notes: Mapping[str, str]) -> list[str]:
    value = values.get(name, field.default)
    if isinstance(value, Mapping):
        return []  # tables of their own, such as [subsets.NAME]
    comment = f"{field.description}" + (f" {notes[name]}" if name in notes else "")
    lines = [f"# {line}" for line in textwrap.wrap(comment, _WIDTH - 2)]
    if value is None:
        return [*lines, f"# {name} ="]
    shown = f"{name} = {toml_value(value)}"
    active = name in values or not option_extra(field)["advanced"]
    return [*lines, shown if active else f"# {shown}"]
