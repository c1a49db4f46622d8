"""Reads what a user of sd-scripts has: a command for bash, cmd or PowerShell, a config file, or settings of its GUI."""

import contextlib
import logging
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.config import flatten, read_toml
from sd3pipe.documents import read_json, read_text
from sd3pipe.errors import ParameterError
from sd3pipe.params.sd_scripts import OPTIONS
from sd3pipe.problems import shown
from sd3pipe.project.kohya_gui import from_gui

log = logging.getLogger(__name__)

_SEVERAL = ("words", "floats", "size", "range")  # kinds of options that may be lists
SCRIPT = "sd3_train_network.py"
_WINDOWS = re.compile(r"[\^`][ \t]*\n|\\[\w.%]")  # for bash, a backslash before a letter would be for nothing
_WINDOWS_WORD = re.compile(r"""(?:"[^"]*"|(?<=[\s=])'[^']*'|[^\s"])+""")
_QUOTED = r""""(?:\\.|[^"\\])*"|'[^']*'|\\."""
_QUOTED_ON_WINDOWS = r""""[^"\n]*"|(?<=[\s=])'[^'\n]*'"""
_BETWEEN_WORDS = (
    r"[\\^`][ \t]*(?:\n|\Z)"  # a line's end that ends nothing, in bash, cmd and PowerShell
    r"|(?:^|(?<=\s))#[^\n]*|^[ \t]*@?(?:rem\b|::)[^\n]*"  # remarks
    r"""|(?<=\s)[\d&*]?>>?[ \t]*(?:&\d|"[^"\n]*"|[^\s;|&]+)"""  # where the output goes
)
_BETWEEN_COMMANDS = r"&&|\|\||[;|&\n]"
_ASSIGNMENT = re.compile(  # of cmd; of bash and PowerShell
    r"""set\s+"?(\w+)=(.*?)"?|(?:export\s+|\$(?:env:)?)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S*))""", re.I
)
_CHANGE_OF_FOLDER = re.compile(r"(?:cd|chdir|pushd|set-location)\s+\S", re.I)
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(?:env:)?([a-z_]\w*)|%([a-z_]\w*)%|!([a-z_]\w*)!", re.I)
_NOT_EXPANDED = re.compile(rf"{_VARIABLE.pattern}|\$[\w({{@*]\S*", re.I)
# Quotes, dashes and spaces as web pages print them.
_OF_THE_WEB = re.compile("(?:^|=)[\u2018\u2019\u201c-\u201e\u2013\u2014]|\xa0")


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
            return {**_typed(settings), **read_command(more)}
        case ".sh" | ".bat" | ".cmd" | ".ps1" | ".txt":
            return read_command(read_text(Path(words[0])))
    if len(words) > 1:
        return _options(_behind_the_script(words))
    return read_command(read_text(Path(words[0])) if _is_file(words[0]) else words[0])


def _is_file(word: str) -> bool:
    with contextlib.suppress(OSError):  # a command may be longer than a path can be
        return Path(word).is_file()
    return False


def read_command(text: str) -> dict[str, Any]:
    """Returns the options of the one command of sd3_train_network.py in a text, or of a text of options alone.

    Variables that the text or the environment sets have their values. Raises ParameterError.
    """
    text = text.replace("\r\n", "\n")
    is_windows = bool(_WINDOWS.search(text))
    commands = list(_commands(text, is_windows=is_windows))
    words = [_split(command, is_windows=is_windows) if SCRIPT in command else [] for command in commands]
    ours = [number for number, of_a_command in enumerate(words) if any(map(_is_script, of_a_command))]
    if not ours:
        return _options(_behind_the_script(_split(" ".join(commands), is_windows=is_windows)))
    if len(ours) > 1:
        raise ParameterError(f"{len(ours)} commands of {SCRIPT} stand here, and a project is one training: give one")
    following = "".join(commands[ours[0] + 1 : ours[0] + 2])
    if following.startswith("--"):
        raise ParameterError(
            f"{following}: begins a line of its own: the line above it must end in \\, ^ or `, with no remark between"
        )
    for command in filter(_CHANGE_OF_FOLDER.match, commands[: ours[0]]):
        log.warning("%s: relative paths count from the current folder: if it is another, run from-kohya there", command)
    return _options(_behind_the_script(words[ours[0]]))


def read_config(path: Path) -> dict[str, Any]:
    """Returns the options of an sd-scripts config file, whose tables are headings only. Raises ParameterError."""
    return _typed(dict(flatten(read_toml(path))))


def _commands(text: str, *, is_windows: bool) -> Iterator[str]:
    """Yields a script's commands, each on one line, with the values of the variables that were set before it."""
    quoted = _QUOTED_ON_WINDOWS if is_windows else _QUOTED
    marks = re.compile(f"{_BETWEEN_WORDS}|({quoted})|({_BETWEEN_COMMANDS})", re.I | re.M)
    variables = dict(os.environ)
    for command in marks.sub(lambda mark: mark[1] or ("\0" if mark[2] else " "), text).split("\0"):
        if assigned := _ASSIGNMENT.fullmatch(command.strip()):
            name, value = [*filter(None, assigned.groups()), ""][:2]
            variables[name] = _expanded(value, variables)
        elif command.strip():
            yield _expanded(command.strip(), variables)


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: variables.get(next(filter(None, found.groups())), found[0]), text)


def _split(text: str, *, is_windows: bool) -> list[str]:
    if is_windows:
        if text.count('"') % 2:
            raise ParameterError(f'the command cannot be split into words: a " has no other: {text}')
        words = _WINDOWS_WORD.findall(text)
        return [re.sub(r"""(?<![\w.])'([^']*)'|"([^"]*)\"""", r"\1\2", word) for word in words]
    try:
        return [word for word in shlex.split(text) if not word.isspace()]
    except ValueError as error:
        raise ParameterError(f"the command cannot be split into words: {error}") from error


def _is_script(word: str) -> bool:
    return re.split(r"[/\\]", word)[-1] == SCRIPT


def _behind_the_script(words: Sequence[str]) -> list[str]:
    script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        return list(words)
    if not _is_script(words[script]):
        raise ParameterError(f"{words[script]}: only commands of {SCRIPT} (SD3 LoRA training) can be translated")
    return list(words[script + 1 :])


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Returns the options in the words behind the script, and below them those of a --config_file."""
    _check_words(words)
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
    below = read_config(Path(config if config.endswith(".toml") else f"{config}.toml").expanduser()) if config else {}
    return {**below, **_typed(options)}


def _check_words(words: Sequence[str]) -> None:
    """Raises ParameterError for what the shell would have put in, and for what a web page has put in."""
    variables = dict.fromkeys(found[0] for word in words for found in _NOT_EXPANDED.finditer(word))
    if variables:
        raise ParameterError(f"{', '.join(variables)}: nothing here sets it: put the value in its place")
    if bent := next((word for word in words if _OF_THE_WEB.search(word)), None):
        raise ParameterError(f"{bent}: has quotes, dashes or spaces as web pages print them: type them anew")


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
        if number == value or (share and number >= 100):
            return value  # which no stage takes
        return number / 100 if share else int(number) if number >= 1 else number
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
