"""Finds, among values that a reader refuses, the ones that it refuses them for."""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from sd3pipe.errors import Sd3pipeError
from sd3pipe.files import write_text

K = TypeVar("K")
V = TypeVar("V")


def accepted(
    values: Mapping[K, V],
    problems: Callable[[Mapping[K, V]], list[str]],
    *,
    word: Callable[[K], str],
    longest: Iterable[str] = (),
) -> tuple[dict[K, V], dict[K, str]]:
    """Returns the values that a reader takes together, and for each other one why not.

    `problems` gives the reader's complaints, `word` what a complaint calls a value. Of values that do not fit together
    the ones whose word is in `longest` stay. Raises ValueError if the reader complains whatever is left out.
    """
    kept, left_out = dict(values), dict[K, str]()
    while found := problems(kept):
        text = "\n".join(found)

        def unlikely(key: K, text: str = text) -> tuple[bool, bool]:
            return (not re.search(rf"\b{re.escape(word(key))}\b", text), word(key) in longest)

        for key in sorted(kept, key=unlikely):
            fewer = problems({other: value for other, value in kept.items() if other != key})
            gone = [line for line in found if line not in fewer]
            if gone:
                left_out[key] = _behind_its_value(gone[0], word(key))
                del kept[key]
                break
        else:
            raise ValueError(text)
    return kept, left_out


def complaints(text: str, name: str, read: Callable[[Path], object]) -> list[str]:
    """Returns what a reader of files says to a file of this text and name, a line for each problem."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        write_text(file, text)
        try:
            read(file)
        except Sd3pipeError as error:
            return str(error).replace(f"{file}: ", "").splitlines()
    return []


def _behind_its_value(complaint: str, word: str) -> str:
    """Returns what follows 'WHERE: WORD = VALUE: ' in a complaint."""
    return re.sub(rf"^.*?\b{re.escape(word)}(?: = .*?)?: ", "", complaint, count=1)
