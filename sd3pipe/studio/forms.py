"""Forms made from option sets: a field per option with its help, range, default and what differs from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sd3pipe.config import Project, flatten, read_toml
from sd3pipe.documents import DocumentError, read_text
from sd3pipe.errors import ParameterError
from sd3pipe.files import write_text
from sd3pipe.params.command_line import choices as words_of
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import Params, alternatives, option_extra, takes_several
from sd3pipe.params.resolve import check_value, spellings
from sd3pipe.params.stage_edit import edited_stage_file
from sd3pipe.params.stage_file import belongs, render_stage_file
from sd3pipe.problems import reason

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
                    value=as_text(values.get(name)),
                    default=as_text(field.default),
                    range=_range(field),
                    words=tuple(choices(field)),
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
        default = as_text(model.model_fields[name].default)
        now = as_text(values.get(name))
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
        if field is None or not belongs(name, field) or not isinstance(text, str) or text == as_text(before.get(name)):
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
    parts = [part.strip() for part in text.split(",")] if takes_several(field) else text.strip()
    value = check_value(field, parts, from_text=True)
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def choices(field: FieldInfo) -> list[str]:
    """Returns the words that an option may hold, none where it holds anything else, too."""
    kinds = [kind for kind in alternatives(field.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return ["true", "false"]
    words = words_of(field)
    return words if words and all(getattr(kind, "__args__", None) for kind in kinds) else []


def as_text(value: Any) -> str:
    """Returns a value as a field shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
        model.model_validate({**required, **{n: v for n, v in given.items() if v is not None}}, strict=False)
    except (ValidationError, ParameterError) as error:
        texts = [reason(item) for item in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        return {next((name for name in model.model_fields if name in text), ""): text for text in texts}
    return {}


def _range(field: FieldInfo) -> str:
    found = [f"{words} {getattr(item, key):g}" for item in field.metadata for key, words in _BOUNDS.items()
             if getattr(item, key, None) is not None]  # fmt: skip
    return ", ".join(found)
