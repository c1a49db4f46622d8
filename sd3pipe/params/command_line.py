"""The bridge from option sets to Typer: a signature whose parameters are the fields, all taken as text."""

import importlib
import inspect
import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from sd3pipe.config import find_project
from sd3pipe.errors import ParameterError
from sd3pipe.params.fields import Params, alternatives, option_extra, takes_several
from sd3pipe.params.resolve import explain, option_name, resolve, spellings
from sd3pipe.params.sd_scripts import OPTIONS
from sd3pipe.stages import STAGES

log = logging.getLogger(__name__)

CONFIG_OPTION = "config"
MACHINE_PANEL = "Machine"
STAGE_MODULES = tuple(dict.fromkeys(stage.module for stage in STAGES))
_MAX_SHOWN_CHOICES = 4


def load_model(command_name: str) -> type[Params]:
    """Returns the option set of a command: CacheLsParams in cache.py for 'cache ls'."""
    module = importlib.import_module(f"sd3pipe.params.{command_name.split()[0].replace('-', '_')}")
    return getattr(module, f"{re.sub('[ _-]', '', command_name.title())}Params")


def load_stage_models() -> dict[str, type[Params]]:
    """Returns the option sets of all stages by their module names."""
    return {module: load_model(module) for module in STAGE_MODULES}


def signature(model: type[Params], *, show_all: bool) -> inspect.Signature:
    """Returns the Typer signature of an option set; advanced options are hidden unless `show_all`."""

    def place(item: tuple[str, FieldInfo]) -> tuple[bool, bool]:  # arguments first, what concerns the machine last
        extra = option_extra(item[1])
        return not extra["positional"], extra["panel"] == MACHINE_PANEL

    fields = sorted(model.model_fields.items(), key=place)
    parameters = [_parameter(name, field, show_all=show_all) for name, field in fields]
    config = typer.Option("--config", help="Parameter file to use instead of the project's own.", metavar="FILE")
    parameters.append(_keyword(CONFIG_OPTION, str | None, config))
    if hidden := sum(option_extra(field)["advanced"] for _, field in fields):
        show = typer.Option("--help-all", help=f"Show the other {hidden} options, too.")
        parameters.append(_keyword("help_all", bool, show, default=False))
    return inspect.Signature(parameters)


def _keyword(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def options_given(command_name: str, model: type[Params], given: Mapping[str, Any], typed: Mapping[str, str]) -> Params:
    """Returns the checked options from what Typer collected, and how the user spelled them. Raises ParameterError."""
    values = {name: value for name, value in given.items() if name in model.model_fields and value not in (None, [])}
    config = given.get(CONFIG_OPTION)
    return resolve(
        model,
        command_name,
        values,
        config=Path(config) if config else None,
        project=find_project(Path.cwd()),
        stage_models=load_stage_models,
        typed=typed,
    )


def options_typed(model: type[Params], arguments: list[str]) -> dict[str, str]:
    """Returns the options that stand in the arguments as they were spelled, by their fields."""
    names = spellings(model)
    words = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", arguments)]
    found = {names.get(word[2:].replace("-", "_")): word for word in words if word.startswith("--")}
    return {name: word for name, word in found.items() if name is not None}


def normalise(model: type[Params], arguments: list[str]) -> list[str]:
    """Returns the arguments in the one spelling that Typer knows.

    '--output_dir X' becomes '--out X' where that is an alias, and '--network-args a b' becomes
    '--network-args a --network-args b', and '--gradient-checkpointing' alone '--gradient-checkpointing=on'.
    """
    aliases = {option_name(alias): option_name(name) for alias, name in spellings(model).items() if alias != name}
    several = {option_name(name) for name, field in model.model_fields.items() if takes_several(field)}
    spread: list[str] = []
    current: str | None = None
    end = arguments.index("--") if "--" in arguments else len(arguments)
    switches = {option_name(name) for name, field in model.model_fields.items() if option_extra(field)["switch"]}
    for word, following in itertools.pairwise([*arguments[:end], "--"]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            name = aliases.get(name, name)
            turned_off = f"--{name.removeprefix('--no-')}"
            if name in switches and not equals and following.startswith("--"):
                equals, value = "=", "on"
            elif name.startswith("--no-") and turned_off in switches:
                name, equals, value = turned_off, "=", "off"
            current = name if name in several and not equals else None
            if current is None:
                spread.append(name + equals + value)
        elif current is not None:
            spread += [current, word]
        else:
            spread.append(word)
    return spread + arguments[end:]


def answer_others(command_name: str, model: type[Params], arguments: list[str]) -> list[str]:
    """Returns a stage's arguments without the options whose wish is met anyway, each of which is told in a line.

    Raises ParameterError with one line for each option that the stage does not have, as for a key of its file.
    """
    names = {CONFIG_OPTION, "help", "help_all", *model.model_fields}
    known = {option_name(name) for name in names} | {f"--no-{option_name(name)[2:]}" for name in names}
    if command_name == "from-kohya":
        ours = itertools.takewhile(lambda word: word != "--", arguments)
        if foreign := [word for word in ours if word.startswith("--") and word.partition("=")[0] not in known]:
            raise ParameterError(f"{foreign[0]}: is no option of from-kohya: put the command in quotes, or after --")
    if command_name.replace("-", "_") not in STAGE_MODULES:
        return arguments
    kept: list[str] = []
    problems: list[str] = []
    words = iter(arguments)
    for word in words:
        spelled, equals, value = word.partition("=")
        if not spelled.startswith("--") or spelled in known:
            kept.append(word)
            continue
        name = spelled[2:].replace("-", "_")
        given: Any = {"true": True, "false": False}.get(value.lower(), value) if equals else True
        if not equals and name in OPTIONS and OPTIONS[name].kind != "flag":
            given = next(words, "")
        found = explain(name, given, model.model_fields, load_stage_models, noun="option")
        if found.accepted:
            log.info("%s: %s", spelled, found.text)
        else:
            problems.append(f"{spelled}: {found.text}")
    if problems:
        raise ParameterError("\n".join(problems))
    return kept


def _parameter(name: str, field: FieldInfo, *, show_all: bool) -> inspect.Parameter:
    extra = option_extra(field)
    kind: Any = list[str] if takes_several(field) else bool if field.annotation in (bool, bool | None) else str
    info: Any
    if extra["positional"]:
        info = typer.Argument(help=_help(field), metavar=name.upper(), show_default=False)
    else:
        info = typer.Option(
            f"{option_name(name)}/--no-{option_name(name)[2:]}" if kind is bool else option_name(name),
            help=_help(field),
            metavar=None if kind is bool else _metavar(field),
            show_default=False,
            rich_help_panel=extra["panel"],
            hidden=extra["advanced"] and not show_all,
        )
    return _keyword(name, kind | None, info)


def _help(field: FieldInfo) -> str:
    """Returns the description with choices and default; Typer reads brackets as rich markup, so they are escaped."""
    notes = [f"one of {', '.join(choices(field))}"] if len(choices(field)) > _MAX_SHOWN_CHOICES else []
    if not field.is_required() and field.default not in (None, "", (), {}):
        switched = {True: "on", False: "off"}
        notes.append(f"default: {switched[field.default] if isinstance(field.default, bool) else field.default}")
    shown = f"{field.description} [{'; '.join(notes)}]" if notes else field.description or ""
    return shown.replace("[", "\\[")


def _metavar(field: FieldInfo) -> str:
    """Returns what stands for the value in the help: a few choices, or the type's name."""
    if len(choices(field)) > _MAX_SHOWN_CHOICES:
        return "CHOICE"
    parts = [_metavar_of(kind) for kind in alternatives(field.annotation)]
    return "|".join(dict.fromkeys(part for part in parts if part))


def choices(field: FieldInfo) -> list[str]:
    """Returns the words that an option may hold, beside what else it may."""
    kinds = alternatives(field.annotation)
    return [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def _metavar_of(kind: Any) -> str:
    if kind is type(None):
        return ""
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"{_metavar_of(get_args(kind)[0])}..."
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")
