"""Forms made from option sets: a field per option with its help, range, default and what differs from it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sd3pipe.adapters.options import network_args, pattern_rules
from sd3pipe.config import Project, flatten, read_toml
from sd3pipe.documents import DocumentError, parse_json, read_text
from sd3pipe.errors import ParameterError
from sd3pipe.files import write_text
from sd3pipe.params.command_line import choices as words_of
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import Params, alternatives, option_extra, takes_several
from sd3pipe.params.resolve import check_value, spellings
from sd3pipe.params.stage_edit import edited_stage_file
from sd3pipe.params.stage_file import belongs, render_stage_file
from sd3pipe.params.train import TrainParams
from sd3pipe.problems import reason
from sd3pipe.training.key_values import parse_args
from sd3pipe.training.schedules import make_schedule

_WORD = TypeAdapter(str)
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormField:
    """One option as a form shows it; `value` is "" where the file leaves it to the default."""

    name: str
    help: str
    value: str
    default: str
    range: str
    words: tuple[str, ...]
    several: bool  # words, one a line
    advanced: bool

    @property
    def differs(self) -> bool:
        return self.value not in ("", self.default)


def stage_form(project: Project, module: str) -> dict[str, list[FormField]]:
    """Returns the fields of a stage's options by panel. Raises ParameterError for a file that is no TOML."""
    model = load_stage_models()[module]
    values = _in_file(project.stage_file(module), model)
    panels: dict[str, list[FormField]] = {}
    for name, field in model.model_fields.items():
        if belongs(name, field) and not isinstance(field.default, Mapping):
            extra = option_extra(field)
            panels.setdefault(extra["panel"], []).append(
                FormField(
                    name=name,
                    help=field.description or "",
                    value=as_text(field, values.get(name)),
                    default=as_text(field, field.default),
                    range=_range(field),
                    words=tuple(choices(field)),
                    several=takes_several(field) and not _takes_numbers(field),
                    advanced=extra["advanced"],
                )
            )
    return panels


def changed_elsewhere(
    project: Project, module: str, was: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, str]:
    """Returns what fields hold by now that a form changes, and that are neither as it `was` nor as it wants them.

    An option that stands in the file at its default is as one that is left to it.
    """
    model = load_stage_models()[module]
    values = _in_file(project.stage_file(module), model)
    found: dict[str, str] = {}
    for name in was.keys() & given.keys() & model.model_fields.keys():
        field = model.model_fields[name]
        default, now = as_text(field, field.default), as_text(field, values.get(name))
        if (now or default) not in [str(text) or default for text in (was[name], given[name])]:
            found[name] = now
    return found


def save_stage(project: Project, module: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Writes what a form says into the stage's file; returns what is wrong by field, and then writes nothing.

    An empty field leaves the option to its default. Raises ParameterError, StorageError.
    """
    model, file = load_stage_models()[module], project.stage_file(module)
    before = _in_file(file, model)
    changes: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, text in given.items():
        field = model.model_fields.get(name)
        if field is None or not belongs(name, field) or not isinstance(text, str):
            continue
        if text == as_text(field, before.get(name)):
            continue
        try:
            changes[name] = checked_value(field, text) if text.strip() else None
        except ValidationError as error:
            wrong[name] = "; ".join(sorted({reason(item) for item in error.errors()}))
    if not wrong:
        wrong = _together(model, {**before, **changes})
    if wrong or not changes:
        return wrong
    try:
        text = read_text(file)
    except DocumentError as error:
        if not error.missing:
            raise
        text = render_stage_file(model, module.replace("_", "-"))
    write_text(file, edited_stage_file(text, changes, spellings(model), str(file)))
    return {}


def checked_value(field: FieldInfo, text: str) -> Any:
    """Returns what a person typed as the option's value in TOML. Raises ValidationError."""
    typed: Any = text.strip()
    if takes_several(field):
        parts = re.split(r"[,\s]+" if _takes_numbers(field) else r"[\r\n]+", typed)
        typed = [_unquoted(part.strip()) for part in parts if part.strip()]
    value = check_value(field, typed, from_text=True)
    if isinstance(value, tuple):
        return [str(part) if isinstance(part, Path) else part for part in value]
    return str(value) if isinstance(value, Path) else value


def choices(field: FieldInfo) -> list[str]:
    """Returns the words that an option may hold, none where it holds anything else, too."""
    kinds = [kind for kind in alternatives(field.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return ["true", "false"]
    words = words_of(field)
    return words if words and all(getattr(kind, "__args__", None) for kind in kinds) else []


def as_text(field: FieldInfo, value: Any) -> str:
    """Returns a value as a field shows it: of several numbers with commas between, of words with one a line.

    `checked_value` makes the same value of it.
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if _takes_numbers(field) else "\n".join(_quoted(str(word)) for word in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _takes_numbers(field: FieldInfo) -> bool:
    """Returns whether an option takes several numbers."""
    return any(get_args(kind)[:1] in ((int,), (float,)) for kind in alternatives(field.annotation))


def _quoted(word: str) -> str:
    """Returns a word as it stands on a line: between quotes where the line alone would read as another."""
    is_plain = word.isprintable() and word == word.strip() and word[:1] not in ("", '"')
    return word if is_plain else json.dumps(word, ensure_ascii=False)


def _unquoted(line: str) -> str:
    try:
        return parse_json(line, _WORD, "the line") if line.startswith('"') else line
    except DocumentError:
        return line


def _in_file(file: Path, model: type[Params]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    known = spellings(model)
    return {known[key]: value for key, value in flatten(read_toml(file)) if key in known}


def _together(model: type[Params], values: Mapping[str, Any]) -> dict[str, str]:
    """Returns what is wrong with values that are fine each for itself, at the first field that the message names."""
    required = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        params = model.model_validate({**required, **{n: v for n, v in given.items() if v is not None}}, strict=False)
        texts = _of_training(params) if isinstance(params, TrainParams) else []
    except (ValidationError, ParameterError) as error:
        texts = [reason(item) for item in error.errors()] if isinstance(error, ValidationError) else [str(error)]
    return {next((n for n in re.findall(r"\w+", text) if n in model.model_fields), ""): text for text in texts}


def _of_training(params: TrainParams) -> list[str]:
    """Returns what train would refuse of options that hold words of its own."""
    adapter, optimizer = params.adapter, params.optimizer
    checks = (
        lambda: network_args(adapter.network_args),
        lambda: pattern_rules("rank_rules", adapter.rank_rules, int),
        lambda: pattern_rules("lr_rules", adapter.lr_rules, float),
        lambda: parse_args("optimizer_args", optimizer.optimizer_args),
        lambda: make_schedule(params.schedule, params.batches.max_train_steps),
    )
    found = []
    for check in checks:
        try:
            check()
        except ParameterError as error:
            found.append(str(error))
    return found


def _range(field: FieldInfo) -> str:
    found = [f"{words} {getattr(item, key):g}" for item in field.metadata for key, words in _BOUNDS.items()
             if getattr(item, key, None) is not None]  # fmt: skip
    return ", ".join(found)
