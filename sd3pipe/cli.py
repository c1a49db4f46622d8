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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from sd3pipe import safe_path, stopping
from sd3pipe.console import say, say_aside, say_error, setup_logging, version
from sd3pipe.cores import bound_spinning
from sd3pipe.errors import ExitCode, InputError, Sd3pipeError, Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One row of the command table; `name` has two words for a command of a group."""

    name: str
    params: str  # "module:Class" below sd3pipe.params
    program: str  # "module:function" below sd3pipe.commands
    help: str


def _stage(name: str, help: str) -> Command:
    module = name.replace("-", "_")
    class_name = "".join(word.title() for word in name.split("-")) + "Params"
    return Command(name=name, params=f"{module}:{class_name}", program=f"{module}:main", help=help)


def _part(group: str, name: str, help: str) -> Command:
    class_name = f"{group.title()}{name.title()}Params"
    return Command(name=f"{group} {name}", params=f"{group}:{class_name}", program=f"{group}:{name}", help=help)


COMMANDS = (
    _stage("init", "Write a project for your own pictures and model."),
    _stage("doctor", "Show on one screen what is here: torch, device, memory, disk, tokenizers."),
    _stage("demo", "Run the whole pipeline on the embedded demo."),
    _stage("preview", "Draw what training will see, before anything is encoded."),
    _stage("plan", "Tell memory, time and disk beforehand, and which settings fit."),
    _stage("run", "Do every stage that is not up to date, each in its own process."),
    _stage("caption", "Let a model caption the pictures that nobody has captioned."),
    _stage("encode-text", "Encode captions or sample prompts into a cache."),
    _stage("encode-latents", "Encode pictures into a cache."),
    _stage("train", "Train an adapter from the caches."),
    _stage("export", "Write an adapter for ComfyUI, sd-scripts or diffusers."),
    _stage("check-captions", "Find captions and pictures that do not belong together."),
    _stage("judge", "Compare checkpoints on equal noise, and say how sure that is."),
    _stage("sample", "Draw pictures with a model and an adapter."),
    _stage("report", "Write one HTML page about one run or two."),
    _stage("studio", "See pictures, captions and runs in a browser; edit, start, compare."),
    _part("cache", "ls", "List a cache: recipe, rows, sizes."),
    _part("cache", "verify", "Check every checksum and key."),
    _part("cache", "why", "Say why a picture's or caption's row is a hit or a miss."),
    _part("cache", "gc", "Delete unused rows."),
    _part("cache", "merge", "Unite caches from several machines."),
    _part("cache", "export", "Write a cache as plain zarr arrays."),
    _part("adapter", "inspect", "Show rank, norms, metadata and what base an adapter fits."),
    _part("adapter", "convert", "Convert an adapter between formats, losslessly."),
    _part("adapter", "resize", "Change an adapter's rank."),
    _part("adapter", "merge", "Merge several adapters into one."),
    _part("adapter", "extract", "Extract an adapter from the difference of two checkpoints."),
    _stage("tokenizers", "Fetch the three tokenizers into a folder."),
    _stage("pack", "List what another machine needs, with sizes and minutes."),
    _stage("from-kohya", "Turn an sd-scripts command or config into a project."),
)
_CONTEXT = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["--help", "-h"]}
_GROUP_HELP = {
    "cache": "Look into caches, check them, unite them.",
    "adapter": "Inspect, convert, resize and merge adapters.",
}


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
    except Abort:
        return _stopped("stopped: the same command goes on from here")
    except Exception as error:  # the outermost frame: whatever arrives here is our own bug
        if stopping.reason():  # a process beside this one was told to stop, too, and did not answer any more
            return _stopped(f"stopped by {stopping.reason()} ({type(error).__name__}: {error})")
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # in a dataset or a list of pictures
            return _fail(f"{str(error.filename)[:60]}...: the name is too long for the file system", ExitCode.INPUT)
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
    groups: dict[str, typer.Typer] = {}
    for command in COMMANDS:
        *group, word = command.name.split()
        parent = _group(app, groups, group[0]) if group else app
        chosen = [word for word in arguments if not word.startswith("-")][: len(group) + 1] == [*group, word]
        body = _command_body(command, arguments) if chosen else _do_nothing
        parent.command(word, help=command.help, context_settings=_CONTEXT)(body)
    return app


def _group(app: typer.Typer, groups: dict[str, typer.Typer], name: str) -> typer.Typer:
    if name not in groups:
        groups[name] = typer.Typer(help=_GROUP_HELP[name], no_args_is_help=True)
        app.add_typer(groups[name], name=name)
    return groups[name]


def _do_nothing() -> None:
    """Stands for a command that the command line does not name."""


def _show_version(wanted: bool) -> None:
    if wanted:
        say(version())
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)]


def _root(show: _Version = False) -> None:
    """Takes what stands before a command."""


def _command_body(command: Command, arguments: list[str]) -> Callable[..., None]:
    """Returns the function that Typer makes a command of: its signature is the option set's."""
    from sd3pipe.params import command_line  # pydantic takes 100 ms; plain `sd3pipe --help` does without

    model = command_line.load_model(command.params)
    show_all = "--help-all" in arguments
    normal = command_line.answer_others(command.name, model, command_line.normalise(model, arguments))
    arguments[:] = ["--help" if word == "--help-all" else word for word in normal]

    def body(**given: Any) -> None:
        _check_current_folder()
        _run_program(command, command_line.options_given(command.name, model, given))

    body.__signature__ = command_line.signature(model, show_all=show_all)  # pyright: ignore[reportFunctionMemberAccess]
    return body


def _check_current_folder() -> None:
    """Raises InputError where there is none: it was deleted, and relative paths mean nothing in it."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(f"the current folder is not there any more ({error.strerror}): change to another") from error


def _run_program(command: Command, params: Any) -> None:
    module_name, function_name = command.program.split(":")
    module = importlib.import_module(f"sd3pipe.commands.{module_name}")
    _collect_garbage_again()
    stopping.check()
    getattr(module, function_name)(params)


def _collect_garbage_again() -> None:
    """Lets Python seek cycles from here on, but not in what is imported: it stays, and costs a start half a second."""
    if not gc.isenabled():  # where this package's own main began
        gc.freeze()
        gc.enable()


def _fail(message: str, code: int) -> int:
    for line in message.split("\n"):
        say_error(line)
    return code


def _stopped(message: str) -> int:
    say_aside(message)
    return ExitCode.STOPPED


def _keep_traceback(error: Exception) -> str:
    """Returns the line for a bug of ours, after writing its traceback to a file."""
    with tempfile.NamedTemporaryFile("w", prefix="sd3pipe-traceback-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {error}: this is a bug in sd3pipe; please report it with {file.name}"
