"""Makes one set of options from the command line, a parameter file, project.toml and the defaults.

Precedence: option > --config FILE or stages/COMMAND.toml > project.toml [paths] > default. All problems are collected
and shown together.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sd3pipe.config import PROJECT_FILE, Project, flatten, read_toml, relative_to
from sd3pipe.errors import ParameterError
from sd3pipe.params.fields import Params, is_foreign_code, option_extra, takes_several
from sd3pipe.params.sd_scripts import DATASET_KEYS, OPTIONS, Answer, answer
from sd3pipe.problems import reason
from sd3pipe.stages import HUB_KEYS, place

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Params)
StageModels = Callable[[], Mapping[str, type[Params]]]

# Keys of our own that stand in older projects.
_GONE = {"imported": "rows that sd-scripts cached are not taken over any more; remove the key, and all is encoded here"}
_ABOUT_DRY_RUN = "`sd3pipe run --dry-run` checks every stage and tells what lies ahead, `sd3pipe plan` memory and time"
_SUFFIX = ".safetensors"
_FOLDERS = ("hub",)  # formats of an export that are folders


def option_name(field_name: str) -> str:
    """Returns how a field is spelled on the command line: 'network_dim' -> '--network-dim'."""
    return "--" + field_name.replace("_", "-")


def _shown_name(name: str, field: FieldInfo) -> str:
    """Returns how the help calls an option: '--network-dim', or 'FOLDER' for an argument without a name."""
    return name.upper() if option_extra(field)["positional"] else option_name(name)


def resolve(
    model: type[P],
    command: str,
    given: Mapping[str, Any],
    *,
    config: Path | None = None,
    project: Project | None = None,
    stage_models: StageModels = dict,
    typed: Mapping[str, str] | None = None,
) -> P:
    """Returns the options of one command. Raises ParameterError with one line per problem.

    `given` holds the command line's values: strings (a list of them for options that take several) or bools.
    `stage_models` gives the option sets of all stages, to say where a misplaced key belongs; `typed` is how the user
    spelled the options of the command line.
    """
    if config is not None and config.name == PROJECT_FILE:
        place_of_options = Project(folder=config.parent, paths={}).stage_file(command)
        raise ParameterError(
            f"--config {config}: is a project's own file, which is read anyway: options of {command} stand in "
            f"{place_of_options}"
        )
    if config is None and project is not None and project.stage_file(command).is_file():
        config = project.stage_file(command)
    values, origins, problems = _read_config(config, model, project, stage_models) if config else ({}, {}, [])
    problems += _not_trusted(model, values, origins, given)
    for name, field in model.model_fields.items():
        key = option_extra(field)["paths_key"] or ""
        if project is not None and key.partition("/")[0] in project.paths and name not in values:
            values[name] = _varied(model, name, place(project.paths, key), given, values)
            origins[name] = f"project.toml: paths.{key}"
    for name, value in given.items():
        values[name] = value
        origins[name] = (typed or {}).get(name) or _shown_name(name, model.model_fields[name])
    for name in values.keys() - given.keys():
        overridden = option_extra(model.model_fields[name])["overrides"]
        if overridden in given:  # the command line was to decide
            log.info("%s = %s: left out for %s", origins[name], values.pop(name), origins[overridden])
    checked: dict[str, Any] = {}
    for name, value in values.items():
        several = value if isinstance(value, list) else [value]
        if "" in several and option_extra(model.model_fields[name])["role"] == "path":  # which would be here
            joined = _joined(origins[name])
            problems.append(f"{origins[name]}{joined}'': is empty, and the path of a file or folder is wanted")
            continue
        try:
            checked[name] = check_value(model.model_fields[name], value, from_text=name in given)
        except ValidationError as error:
            problems.append(_problem(origins[name], value, error, model.model_fields[name]))
    if project is not None and command.startswith("encode-"):  # train goes on from the caches that are there
        gone = [key for key in project.paths if key in _GONE]
        problems += [f"{project.file}: paths.{key}: not supported: {_GONE[key]}" for key in gone]
    problems += _missing(model, command, values)
    if problems:
        raise ParameterError("\n".join(problems))
    return _build(model, command, checked, origins)


def _not_trusted(
    model: type[Params], values: Mapping[str, Any], origins: Mapping[str, str], given: Mapping[str, Any]
) -> list[str]:
    """Returns what a parameter file says that is for the user to say: the file may come from anybody."""
    problems = []
    for name in values.keys() - given.keys():
        trust, option = option_extra(model.model_fields[name])["trust"], option_name(name)
        if trust == "typed":
            problems.append(f"{origins[name]}: is for the command line alone: {option}")
        if trust == "code" and is_foreign_code(values[name]) and not given.get("allow_code"):
            problems.append(
                f"{origins[name]} = {values[name]}: would be imported and run: pass --allow-code if you trust it, "
                f"or say {option} {values[name]} yourself"
            )
    return problems


def _read_config(
    path: Path, model: type[Params], project: Project | None, stage_models: StageModels
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Returns what a parameter file says by option, where it says so, and a line for each key that does not belong."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    names = spellings(model)
    for key, value in flatten(read_toml(path)):
        name = names.get(key)
        if name in values:
            problems.append(f"{path}: {key}: {name} is set twice")
        elif name is not None:
            extra = option_extra(model.model_fields[name])
            if extra["role"] == "path" and project is not None and isinstance(value, str) and value:
                value = relative_to(project.folder, value, may_be_hub_id=extra["paths_key"] in HUB_KEYS)
            values[name], origins[name] = value, f"{path}: {key}"
        elif key in _GONE:
            problems.append(f"{path}: {key}: not supported: {_GONE[key]}")
        elif (found := explain(key, value, names, stage_models)).accepted:
            log.info("%s: %s: %s", path, key, found.text)
        else:
            shown = f"{key} = {value!r}" if key in OPTIONS and OPTIONS[key].fate == "met" else key
            problems.append(f"{path}: {shown}: {found.text}")
    return values, origins, problems


def explain(
    name: str, value: Any, own: Iterable[str], stage_models: StageModels, *, noun: Literal["key", "option"] = "key"
) -> Answer:
    """Returns what to say to a name that is none of a command's `own`: its wish is met, refused, or belongs elsewhere.

    An unknown name is answered with the nearest known one, and with what that one's answer would be.
    """
    stages = {other: stage for stage, model in stage_models().items() for other in spellings(model)}
    found = answer(name, value)
    if found is not None:
        return found
    if name in stages:
        stage = stages[name].replace("_", "-")
        way_out = "move it to" if noun == "key" else "give it there, or in"
        text = f"belongs to the stage {stage}: {way_out} stages/{stages[name]}.toml"
        return Answer(accepted=False, text=_ABOUT_DRY_RUN if (name, noun) == ("dry_run", "option") else text)
    own = list(own)
    elsewhere = [other for other in (*OPTIONS, *DATASET_KEYS) if answer(other, None) is not None]
    match = next(iter(difflib.get_close_matches(name, [*own, *stages, *elsewhere], n=1)), None)
    if match is None or match in own:
        hint = f" (did you mean {match}?)" if match else ""
    else:
        hint = f" (did you mean {match}? {explain(match, None, own, stage_models, noun=noun).text})"
    return Answer(accepted=False, text=f"unknown {noun}{hint}")


def spellings(model: type[Params]) -> dict[str, str]:
    """Returns every accepted spelling of every option with the field it stands for."""
    return {
        spelling.replace("-", "_"): name
        for name, field in model.model_fields.items()
        for spelling in (name, *option_extra(field)["aliases"])
    }


def _varied(model: type[Params], name: str, value: str, given: Mapping[str, Any], in_file: Mapping[str, Any]) -> str:
    """Returns a path of the project, or beside it one for what the command line makes otherwise than the project."""
    other = option_extra(model.model_fields[name])["varies_with"]
    if other not in given or given[other] == in_file.get(other, model.model_fields[other].default):
        return value
    stem, suffix = (value[: -len(_SUFFIX)], _SUFFIX) if value.endswith(_SUFFIX) else (value, "")
    return f"{stem}-{given[other]}{'' if given[other] in _FOLDERS else suffix}"


def check_value(field: FieldInfo, value: Any, *, from_text: bool) -> Any:
    """Returns `value` as the field's type: strict for a file's values, parsed for the command line's strings."""
    if takes_several(field):  # TOML has lists only, and one path of project.toml may stand for several
        value = tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value
    adapter: TypeAdapter[Any] = TypeAdapter(
        field.rebuild_annotation(), config=ConfigDict(strict=not from_text, allow_inf_nan=False)
    )
    return adapter.validate_python(value)


def _problem(origin: str, value: Any, error: ValidationError, field: FieldInfo) -> str:
    wanted = f"is not of the form that is wanted: {field.description}"  # instead of a regular expression
    reasons = {wanted if item["type"] == "string_pattern_mismatch" else reason(item) for item in error.errors()}
    words = [str(word) for word in value] if isinstance(value, list) and origin.startswith("--") else None
    shown = " ".join(words) if words else repr(value) if not isinstance(value, str) or not value else value
    return f"{origin}{_joined(origin)}{shown}: {'; '.join(sorted(reasons))}"


def _joined(origin: str) -> str:
    return " " if origin.startswith("--") else " = "


def _missing(model: type[Params], command: str, present: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, field in model.model_fields.items():
        if field.is_required() and name not in present:
            key = option_extra(field)["paths_key"]
            where = f" Give it or paths.{key} in project.toml" if key else ""
            problems.append(f"{command}: {_shown_name(name, field)} is missing: {field.description}{where}")
    return problems


def _build(model: type[P], command: str, checked: dict[str, Any], origins: Mapping[str, str]) -> P:
    """Returns the model from checked values; only rules over several options can fail here."""
    try:
        return model.model_validate(checked)
    except ValidationError as error:
        places = [(".".join(map(str, item["loc"])), reason(item)) for item in error.errors()]
        lines = [f"{origins.get(where, where) or command}: {words}" for where, words in places]
        raise ParameterError("\n".join(lines)) from error
