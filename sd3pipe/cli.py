"""The command line: wires each command to its option set and its program, both imported only when it runs.

Typer builds the commands; the options come from the pydantic models in params/, so that each is declared once. Every
failure ends here, as one line on stderr and the exit code of errors.py.
"""

import errno
import gc
import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from sd3pipe import safe_path, stopping
from sd3pipe.console import say, say_aside, setup_logging, version
from sd3pipe.cores import bound_spinning
from sd3pipe.errors import ExitCode, InputError, Sd3pipeError, Stopped, of_system

COMMANDS = {  # name, of two words in a group, and what it does
    "init": "Write a project for your own pictures and model.",
    "doctor": "Show on one screen what is here: torch, device, memory, disk, tokenizers.",
    "demo": "Run the whole pipeline on the embedded demo.",
    "preview": "Draw what training will see, before anything is encoded.",
    "plan": "Tell memory, time and disk beforehand, and which settings fit.",
    "run": "Do every stage that is not up to date, each in its own process.",
    "caption": "Let a model caption the pictures that nobody has captioned.",
    "encode-text": "Encode captions or sample prompts into a cache.",
    "encode-latents": "Encode pictures into a cache.",
    "train": "Train an adapter from the caches.",
    "export": "Write an adapter for ComfyUI, sd-scripts or diffusers.",
    "check-captions": "Find captions and pictures that do not belong together.",
    "judge": "Compare checkpoints on equal noise, and say how sure that is.",
    "sample": "Draw pictures with a model and an adapter.",
    "report": "Write one HTML page about one run or two.",
    "studio": "See pictures, captions and runs in a browser; edit, start, compare.",
    "cache ls": "List a cache: recipe, rows, sizes.",
    "cache verify": "Check every checksum and key.",
    "cache why": "Say why a picture's or caption's row is a hit or a miss.",
    "cache gc": "Delete unused rows.",
    "cache merge": "Unite caches from several machines.",
    "cache export": "Write a cache as plain zarr arrays.",
    "adapter inspect": "Show rank, norms, metadata and what base an adapter fits.",
    "adapter convert": "Convert an adapter between formats, losslessly.",
    "adapter resize": "Change an adapter's rank.",
    "adapter merge": "Merge several adapters into one.",
    "adapter extract": "Extract an adapter from the difference of two checkpoints.",
    "tokenizers": "Fetch the three tokenizers into a folder.",
    "pack": "List what another machine needs, with sizes and minutes.",
    "from-kohya": "Turn an sd-scripts command or config into a project.",
}
_CONTEXT = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["--help", "-h"]}
_GROUPS = {
    "cache": "Look into caches, check them, unite them.",
    "adapter": "Inspect, convert, resize and merge adapters.",
}
_SIGPIPE = 13  # as POSIX numbers it, and Windows has none
_YOUNG_OBJECTS = 100_000  # before Python seeks cycles among them: after its own 700, the records of a large dataset,
# which have none, are gone through again and again, which takes a third of a run that has nothing to do


def main() -> None:
    """Runs the command line and exits with the code of docs/errors.md. The program's door is `sd3pipe.__main__`."""
    safe_path.leave_current_folder_out()
    gc.set_threshold(_YOUNG_OBJECTS)
    gc.disable()  # until the program is imported
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    setup_logging()
    bound_spinning()
    with stopping.listening():
        return _exit_code(arguments)


def _exit_code(arguments: list[str]) -> int:
    try:
        stopping.check()
        app = typer.main.get_command(build_app(arguments))
        result = app.main(arguments, prog_name="sd3pipe", standalone_mode=False)
    except Stopped as stopped:
        return _stopped(str(stopped))
    except Sd3pipeError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:
        return _fail(error.format_message(), ExitCode.PARAMETERS)
    except Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # taken for the end of a user's input, for which nothing asks
            return _fail(_keep_traceback(abort.__cause__), ExitCode.BUG)
        return _stopped("stopped: the same command goes on from here")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # Typer ends so where nobody reads any more, as with `| head`
            return 128 + _SIGPIPE
        raise
    except Exception as error:  # the outermost frame: whatever arrives here is our own bug
        if stopping.reason():  # a process beside this one was told to stop, too, and did not answer any more
            return _stopped(f"stopped by {stopping.reason()} ({type(error).__name__}: {error})")
        if (refused := of_system(error)) is not None:
            return _fail(str(refused), refused.exit_code)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:  # of a redirection
            return _fail("the output cannot be written: the disk is full", ExitCode.STORAGE)
        return _fail(_keep_traceback(error), ExitCode.BUG)
    return result if isinstance(result, int) else ExitCode.DONE


def build_app(arguments: list[str]) -> typer.Typer:
    """Returns the Typer app with the options of the one command that `arguments` names, the others only by name."""
    app = typer.Typer(
        name="sd3pipe",
        help="Train LoRA adapters for Stable Diffusion 3 and 3.5: encode once, anywhere; train anywhere else.",
        no_args_is_help=True,
        add_completion=False,
        context_settings=_CONTEXT,
    )
    app.callback()(_root)
    groups = {name: typer.Typer(help=help, no_args_is_help=True) for name, help in _GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    typed = [word for word in arguments if not word.startswith("-")]
    for name, help in COMMANDS.items():
        *group, word = name.split()
        parent = groups[group[0]] if group else app
        body = _command_body(name, arguments) if typed[: len(group) + 1] == [*group, word] else _do_nothing
        parent.command(word, help=help, context_settings=_CONTEXT)(body)
    return app


def _do_nothing() -> None:
    """Stands for a command that the command line does not name."""


def _show_version(wanted: bool) -> None:
    if wanted:
        say(version())
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)]


def _root(show: _Version = False) -> None:
    """Takes what stands before a command."""


def _command_body(name: str, arguments: list[str]) -> Callable[..., None]:
    """Returns the function that Typer makes a command of: its signature is the option set's."""
    from sd3pipe.params import command_line  # pydantic takes 100 ms; plain `sd3pipe --help` does without

    model = command_line.load_model(name)
    words = [number for number, word in enumerate(arguments) if not word.startswith("-")]
    behind = words[len(name.split()) - 1] + 1  # what stands before a command is the program's own
    own = arguments[behind:]
    typed = command_line.options_typed(model, own)
    normal = command_line.answer_others(name, model, command_line.normalise(model, own))
    arguments[behind:] = ["--help" if word == "--help-all" else word for word in normal]

    def body(**given: Any) -> None:
        _check_current_folder()
        _run_program(name, command_line.options_given(name, model, given, typed))

    body.__signature__ = command_line.signature(model, show_all="--help-all" in own)  # pyright: ignore[reportFunctionMemberAccess]
    return body


def _check_current_folder() -> None:
    """Raises InputError where there is none: it was deleted, and relative paths mean nothing in it."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(f"the current folder is not there any more ({error.strerror}): change to another") from error


def _run_program(name: str, params: Any) -> None:
    """Runs `main` of a command's module, or the function that the second word of its name says."""
    module_name, *function = name.replace("-", "_").split()
    module = importlib.import_module(f"sd3pipe.commands.{module_name}")
    if not gc.isenabled():  # where this package's own main began
        gc.freeze()  # cycles are sought from here on, but not in what is imported: that costs a start half a second
        gc.enable()
    stopping.check()
    getattr(module, function[0] if function else "main")(params)


def _fail(message: str, code: int) -> int:
    for line in message.split("\n"):
        say_aside(f"error: {line}")
    return code


def _stopped(message: str) -> int:
    say_aside(message)
    return ExitCode.STOPPED


def _keep_traceback(error: Exception) -> str:
    """Returns the line for a bug of ours, after writing its traceback to a file."""
    with tempfile.NamedTemporaryFile("w", prefix="sd3pipe-traceback-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {error}: this is a bug in sd3pipe; please report it with {file.name}"
