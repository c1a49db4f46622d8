"""Writes words so that a shell reads them back unchanged: for dvc.yaml, and for commands that a user copies."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable

_WINDOWS = os.name == "nt"
# What a shell may take for something else: nothing at all, signs in front, spaces, quotes, expansions, redirections.
_NEEDS_QUOTES = re.compile(r"""^$|^[#~=@]|[\s"'$`!*?\[\](){}<>|&;\x00-\x1f\x7f]|""" + ("[%^]" if _WINDOWS else r"\\"))
_LIVE_IN_DOUBLE_QUOTES = re.compile(r'["%]|\\$' if _WINDOWS else r'["$`\\!%]')


def shell_line(words: Iterable[str]) -> str:
    """Returns a command line that the shell at hand splits into just these words."""
    return " ".join(map(shell_word, words))


def shell_word(text: str) -> str:
    """Returns `text` as one word for the shell at hand: POSIX's sh, or cmd on Windows."""
    mark = quotation_mark(text)
    if mark is None:
        return subprocess.list2cmdline([text]) if _WINDOWS else shlex.quote(text)
    return f"{mark}{text}{mark}"


def quotation_mark(text: str) -> str | None:
    """Returns what must stand around `text` to make it one word; '' if nothing, None if no mark leaves it unchanged.

    Double quotes come first, which sh, cmd and PowerShell read alike.
    """
    if not _NEEDS_QUOTES.search(text):
        return ""
    if not _LIVE_IN_DOUBLE_QUOTES.search(text):
        return '"'
    return None if _WINDOWS or "'" in text else "'"


def no_option(path: str) -> str:
    """Returns a path that no command takes for an option: './-x' for '-x'."""
    return f"./{path}" if path.startswith("-") else path
