"""Every failure that a user can cause, with the exit code that docs/errors.md lists for it."""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    BUG = 1
    PARAMETERS = 2
    INPUT = 3
    STALE = 4
    QUARANTINE = 5
    NETWORK = 6
    STORAGE = 7
    MEMORY = 8
    STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again to go on


class Sd3pipeError(Exception):
    """Base of all expected failures. The message is one line: what is wrong, where, what to do."""

    exit_code: int = ExitCode.BUG


class ParameterError(Sd3pipeError):
    """An option, a configuration key or a dataset file key cannot be used."""

    exit_code = ExitCode.PARAMETERS


class InputError(Sd3pipeError):
    """An input file is missing, damaged, of a foreign kind or does not fit the others."""

    exit_code = ExitCode.INPUT


class StaleError(Sd3pipeError):
    """Inputs are other than those an existing artifact was made from."""

    exit_code = ExitCode.STALE


class QuarantineError(Sd3pipeError):
    """More pictures were unreadable than the user allowed; the good rows are published."""

    exit_code = ExitCode.QUARANTINE


class NetworkError(Sd3pipeError):
    """A hub could not be reached, or the repository is gated."""

    exit_code = ExitCode.NETWORK


class StorageError(Sd3pipeError):
    """A disk is full, or a folder cannot be written."""

    exit_code = ExitCode.STORAGE


class DeviceMemoryError(Sd3pipeError):
    """The device ran out of memory; the message names settings that fit."""

    exit_code = ExitCode.MEMORY


class Stopped(Sd3pipeError):
    """Stopped on purpose (Ctrl-C, SIGTERM, SIGHUP, time limit); the same command goes on."""

    exit_code = ExitCode.STOPPED


def of_system(error: BaseException | None) -> Sd3pipeError | None:
    """Returns the one-line error for what the system refused by a file's name alone, None for any other exception."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno == errno.ENAMETOOLONG:  # in a dataset or a list of pictures
        return InputError(f"{str(error.filename)[:60]}...: the name is too long for the file system")
    if isinstance(error, PermissionError):
        return InputError(f"{error.filename}: cannot be read ({error.strerror})")
    return None


class UnreadablePicture(Exception):
    """A picture cannot be used. The message is the reason, the same words on every machine.

    It ends nothing: the picture is left out, and listed in the manifest of the cache. Where rows or pixels are yielded,
    it is yielded in their place.
    """


def is_of_the_moment(reason: str) -> bool:
    """Returns whether a picture was left out for what may be over by now: its bytes were not there, or changing."""
    return "it cannot be read (" in reason or "it changed while " in reason
