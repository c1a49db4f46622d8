"""Text, JSON and TOML from a disk: a regular file of bounded size, in UTF-8, of the shape that its reader expects.

Files that a stranger may have put there pass through this door. What comes in is checked here, not where it is used.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sd3pipe.errors import InputError
from sd3pipe.files import nearest_path, open_regular

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

MOST_BYTES = 16_000_000  # captions, prompts, parameter files, reports and manifests are far smaller
MOST_LIST_BYTES = 2_000_000_000  # a list with a line for each of some million pictures, or for each step of a run
LFS_POINTER = b"version https://git-lfs"  # how a file begins that git put in the place of a large one
LFS_REMEDY = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
_AT_LINE = re.compile(r"\(at line (\d+),")  # as tomllib says where a problem is
_TOML_INTEGERS = range(-(2**63), 2**63)  # TOML 1.0, section Integer


class DocumentError(InputError):
    """A file cannot be read, or does not hold what its reader expects; `missing` says that there is none."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


def read_data(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Returns the bytes of a regular file of at most `most_bytes`; neither waits for a pipe nor drains a device.

    Raises DocumentError.
    """
    try:
        with open_regular(path) as file:
            is_larger = os.fstat(file.fileno()).st_size > most_bytes
            data = b"" if is_larger else file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DocumentError(f"{path}: there is no such file{nearest_path(path)}", missing=True) from error
    except IsADirectoryError as error:
        raise DocumentError(f"{path}: is a folder: name a file") from error
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # NUL or half a surrogate pair in the path
        raise DocumentError(f"{path}: is no path of a file ({error})") from error
    if is_larger or len(data) > most_bytes:  # a file of the kernel's does not tell its size
        raise DocumentError(f"{path}: is larger than {most_bytes:,} bytes: it is not what is expected here")
    return data


def holds(path: Path, content: bytes) -> bool:
    """Whether a file is there with just this content."""
    try:
        return read_data(path, most_bytes=len(content)) == content
    except DocumentError:
        return False


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> str:
    """Returns a file's text without byte order mark and with Unix line ends. Raises DocumentError."""
    try:
        text = read_data(path, most_bytes=most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, kind: "TypeAdapter[T]", *, most_bytes: int = MOST_BYTES) -> T:
    """Returns the value of a JSON file, checked by a pydantic adapter. Raises DocumentError."""
    return parse_json(read_data(path, most_bytes=most_bytes), kind, str(path))


def parse_json(data: bytes | str, kind: "TypeAdapter[T]", where: str) -> T:
    """Returns the value in JSON that came from `where`, checked by a pydantic adapter. Raises DocumentError.

    Names of files that are no UTF-8 arrive as Python has them, with lone surrogates.
    """
    try:
        text = data.decode("utf-8-sig", "surrogateescape") if isinstance(data, bytes) else data
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # as JSON escapes surrogates, in pairs or alone
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DocumentError(f"{where}: is not valid JSON: half a surrogate pair stands in it") from error
    except ValueError as error:
        raise DocumentError(f"{where}: is not valid JSON: {error}") from error
    except RecursionError as error:
        raise DocumentError(f"{where}: is not valid JSON: it is nested too deeply") from error
    return checked(value, kind, where)


def checked(value: object, kind: "TypeAdapter[T]", where: str) -> T:
    """Returns a value that came from `where` in the form of a pydantic adapter. Raises DocumentError."""
    from pydantic import ValidationError  # takes 100 ms; `sd3pipe --help` imports this module

    try:
        return kind.validate_python(value)
    except ValidationError as error:
        raise DocumentError(f"{where}: {first_problem(error)}") from error


def first_problem(error: Any) -> str:
    """Returns the first problem of a pydantic ValidationError as 'place: what is wrong'."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file. Raises DocumentError with file and line."""
    return parse_toml(read_text(path), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Returns the tables in TOML that came from `where`. Raises DocumentError."""
    import tomllib  # `sd3pipe --help` reads no TOML

    try:
        tables = tomllib.loads(text)
        _check_integers(tables)
    except ValueError as error:  # TOMLDecodeError, and Python's own for an integer of thousands of digits
        raise DocumentError(f"{where}: is not valid TOML: {error}{_about_backslash(text, str(error))}") from error
    except RecursionError as error:
        raise DocumentError(f"{where}: is not valid TOML: it is nested too deeply") from error
    return tables


def _about_backslash(text: str, problem: str) -> str:
    """Returns the way out if the line that TOML stumbles over holds a path as Windows writes it, else nothing."""
    at = _AT_LINE.search(problem)
    lines = text.split("\n")
    if at is None or "\\" not in lines[min(int(at[1]), len(lines)) - 1]:
        return ""
    return ": a backslash begins an escape between double quotes: write / in paths, or put them into single quotes"


def _check_integers(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _check_integers(item)
    elif isinstance(value, list):
        for item in value:
            _check_integers(item)
    elif isinstance(value, int) and value not in _TOML_INTEGERS:
        raise ValueError(f"the integer {str(value)[:20]}... does not fit into 64 bits")
