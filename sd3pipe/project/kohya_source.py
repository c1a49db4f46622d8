"""Reads what a user of sd-scripts has: a command for bash, cmd or PowerShell, a config file, or settings of its GUI."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.config import flatten, read_toml
from sd3pipe.documents import read_json, read_text
from sd3pipe.errors import ParameterError
from sd3pipe.params.sd_scripts import OPTIONS
from sd3pipe.problems import shown
from sd3pipe.project.kohya_gui import from_gui

_SEVERAL = ("words", "floats", "size", "range")  # kinds of options that may be lists
SCRIPT = "sd3_train_network.py"
_LINE_END = re.compile(r"[\\^`][ \t]*\n")  # bash, cmd, PowerShell
_WINDOWS = re.compile(r"[\^`][ \t]*\n|\\[\w.]")  # for bash, a backslash before a letter would be for nothing
_WINDOWS_WORD = re.compile(r"""(?:"[^"]*"|(?<=[\s=])'[^']*'|[^\s"])+""")
_AFTER_A_COMMAND = ("&&", "||", "|", ";", "&", ">", ">>", "2>&1")


def read_source(words: Sequence[str]) -> dict[str, Any]:
    """Returns the options by name that a command, or the file that the only word names, gives.

    Raises ParameterError, DocumentError.
    """
    suffix = Path(words[0]).suffix.lower() if len(words) == 1 and SCRIPT not in words[0] else ""
    match suffix:
        case ".toml":
            return read_config(Path(words[0]))
        case ".json":
            settings, more = from_gui(read_json(Path(words[0]), TypeAdapter(dict[str, Any])), words[0])
            return {**_typed(settings), **_options(_split(more))}
        case ".sh" | ".bat" | ".cmd" | ".ps1" | ".txt":
            return read_command(read_text(Path(words[0])))
    return read_command(words[0]) if len(words) == 1 else _options(_behind_the_script(words))


def read_command(text: str) -> dict[str, Any]:
    """Returns the options of a command line. Raises ParameterError if it is no command of sd3_train_network.py."""
    text = text.replace("\r\n", "\n")
    lines = _LINE_END.sub(" ", text)
    chosen = next((line for line in lines.splitlines() if SCRIPT in line and not line.startswith("#")), lines)
    return _options(_behind_the_script(_split(chosen, is_windows=bool(_WINDOWS.search(text)))))


def read_config(path: Path) -> dict[str, Any]:
    """Returns the options of an sd-scripts config file, whose tables are headings only. Raises ParameterError."""
    return _typed(dict(flatten(read_toml(path))))


def _split(text: str, *, is_windows: bool = False) -> list[str]:
    if is_windows:
        words = _WINDOWS_WORD.findall(text)
        return [re.sub(r"""(?<![\w.])'([^']*)'|"([^"]*)\"""", r"\1\2", word) for word in words]
    try:
        return [word for word in shlex.split(text) if word.strip()]
    except ValueError as error:
        raise ParameterError(f"the command cannot be split into words: {error}") from error


def _behind_the_script(words: Sequence[str]) -> list[str]:
    """Returns the words of the script's own, up to what pipes it or follows it."""
    ends = [number for number, word in enumerate(words) if word in _AFTER_A_COMMAND]
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        return list(words)
    script = scripts[0]
    if re.split(r"[/\\]", words[script])[-1] != SCRIPT:
        raise ParameterError(f"{words[script]}: only commands of {SCRIPT} (SD3 LoRA training) can be translated")
    return list(words[script + 1 : next((end for end in ends if end > script), len(words))])


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Returns the options in the words behind the script, and below them those of a --config_file."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            longer = [option for option in OPTIONS if option.startswith(name)]
            name = longer[0] if name not in OPTIONS and len(longer) == 1 else name  # as Python's argparse reads it
            given[name] = [value] if equals else []
        elif not name:
            raise ParameterError(f"{word}: is not an option of {SCRIPT}")
        else:
            given[name].append(word)
    options = {key: _value(key, values) for key, values in given.items()}
    config = options.pop("config_file", None)
    if config is True:
        raise ParameterError("--config_file: names no file")
    below = read_config(Path(config if config.endswith(".toml") else f"{config}.toml")) if config else {}
    return {**below, **_typed(options)}


def _value(name: str, words: list[str]) -> Any:
    several = name in OPTIONS and OPTIONS[name].kind in ("words", "floats")
    if several or not words:
        return words or True
    if len(words) > 1:
        raise ParameterError(
            f"--{name}: {words[1]} stands alone behind {words[0]}: put a value with spaces into quotes"
        )
    return words[0]


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with values of their types; a value that is none of its type stays as it is.

    Raises ParameterError for a list or a table where there is one value.
    """
    for name, value in given.items():
        several = _kind(name) in _SEVERAL or name not in OPTIONS
        items = value if isinstance(value, list) and several else [value]
        if any(isinstance(item, list | dict) for item in items) or (value is True and _kind(name) == "str"):
            raise ParameterError(f"{name} = {shown(value)}: must be {'a list of words' if several else 'one value'}")
    return {name: _parsed(_kind(name), value) for name, value in given.items()}


def _kind(name: str) -> str:
    return OPTIONS[name].kind if name in OPTIONS else ""


def _parsed(kind: str, value: Any) -> Any:
    if kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind in ("words", "floats"):
        items = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [_number(item, float) if kind == "floats" else item for item in items]
    if kind in ("size", "range") and isinstance(value, str):
        parts = [_number(part.strip(), int if kind == "size" else float) for part in re.split("[,x]", value)]
        return parts[0] if len(parts) == 1 else parts
    if kind == "flag" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind == "steps" and isinstance(value, str):
        share = value.endswith("%")
        number = _number(value.removesuffix("%"), float)
        return value if number == value else number / 100 if share else int(number) if number >= 1 else number
    return _number(value, int if kind == "int" else float) if kind in ("int", "float") else value


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return value
    if not math.isfinite(number):
        return value  # a word, which no option takes
    return int(number) if kind is int and number.is_integer() else value if kind is int else number
