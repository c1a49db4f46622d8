"""How an option is declared: one pydantic field that carries type, default, range, help and what depends on it."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from sd3pipe.files import followed

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters and more: one is a drive's


def _no_address(value: Any) -> Any:
    """Refuses what a path would make s3:/... of, which is nowhere."""
    if isinstance(value, str) and _ADDRESS.match(value):
        raise ValueError(
            "is an address, and a path on this machine is wanted: copy it here first (`aws s3 sync`, `rclone copy`, "
            "`dvc pull`); an image_dir in a dataset file may be an address"
        )
    return value


OptionPath = Annotated[Path, Field(strict=False), BeforeValidator(_no_address)]  # TOML has no paths, only strings
NewFilePath = Annotated[OptionPath, AfterValidator(followed)]  # refused before any work where no file can come to lie


def _not_around_here(path: Path) -> Path:
    """Refuses the current folder and those above it: what lies in the place of a run may be set aside."""
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError("is the current folder, or holds it: name a folder of its own")
    return path


def _no_folder(name: str) -> str:
    """Refuses what would be no single name in a folder."""
    if re.search(r"[/\\\x00-\x1f\x7f]", name) or not name.strip("."):
        raise ValueError("is no name of a file: leave out slashes and control characters, and not only dots")
    return name


FileName = Annotated[str, AfterValidator(_no_folder)]
RunPath = Annotated[OptionPath, AfterValidator(_not_around_here)]

R = TypeVar("R")

Role = Literal["path", "recipe", "identity", "free"]
# path      names a file or folder; may come from project.toml [paths]; enters nothing (its content does)
# recipe    changes the numbers in cache rows; enters their keys
# identity  changes what a training run computes; must be equal on resume
# free      changes neither; may differ on resume

Trust = Literal["file", "code", "typed"]
# file   a parameter file, which may come from anybody, may set it
# code   as well; but what would be imported and run, a class of any package, needs --allow-code then
# typed  the command line alone


class _Rules(property):
    """What a group's attribute is: the rule that is made from the options' values."""

    def __init__(self, declared: FieldInfo) -> None:
        super().__init__(lambda params: params.rules(declared.annotation))
        self.declared = declared


class Params(BaseModel):
    """Base of all option sets: unknown keys and ill-typed values are errors, instances never change.

    An attribute that is declared with `group` is the rule of its type, and each field of that rule is an option.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Puts the options of each group into its place."""
        declared = dict(cls.__pydantic_fields__)
        groups = {name: field for name, field in declared.items() if dataclasses.is_dataclass(field.annotation)}
        cls.__pydantic_fields__.clear()
        for name, field in declared.items():
            if name in groups:
                rules = field.default if isinstance(field.default, _Rules) else _Rules(field)  # a base's, or its own
                for key, item in _options_of(rules.declared):
                    cls.__pydantic_fields__.setdefault(key, item)  # two rules may share an option
                setattr(cls, name, rules)
            else:
                cls.__pydantic_fields__[name] = field
        if groups:
            cls.model_rebuild(force=True)

    def rules(self, kind: type[R]) -> R:
        """Returns a rule made from the options that are named as its fields. Raises ParameterError."""
        assert dataclasses.is_dataclass(kind)
        return kind(**{item.name: getattr(self, item.name) for item in dataclasses.fields(kind)})

    def as_inputs(self, *names: str) -> dict[str, str | None]:
        """Returns options as a stage's report names its inputs."""
        return {name: str(value) if (value := getattr(self, name)) else None for name in names}

    def with_role(self, role: Role) -> dict[str, Any]:
        """Returns the values of the options with `role`, as JSON types."""
        names = {name for name, field in type(self).model_fields.items() if option_extra(field)["role"] == role}
        return self.model_dump(mode="json", include=names)


def option(
    default: Any,
    help: str,
    *,
    role: Role = "free",
    panel: str = "Options",
    advanced: bool = False,
    positional: bool = False,
    switch: bool = False,
    aliases: tuple[str, ...] = (),
    paths_key: str | None = None,
    varies_with: str | None = None,
    overrides: str | None = None,
    trust: Trust = "file",
    **constraints: Any,
) -> Any:
    """Declares one option; `...` as default makes it required.

    `panel` is the heading in --help; `advanced` options show in --help-all only; `positional` ones are arguments
    without a name on the command line; a `switch` is on where it stands there without a value, and off as --no-NAME;
    `aliases` are further spellings without dashes; `paths_key` is the key of
    project.toml [paths] that fills a missing value ('caches/text' is the folder text/ below the one that `caches`
    names); `varies_with` is an option whose value goes into that file's name where the command line gives another than
    the project's; `overrides` is an option that counts for nothing beside this one; `trust` says what a parameter file
    may do with it; `constraints` are pydantic's (ge, le, gt, lt, min_length, pattern).
    """
    extra = {
        "role": role,
        "panel": panel,
        "advanced": advanced,
        "positional": positional,
        "switch": switch,
        "aliases": list(aliases),
        "paths_key": paths_key,
        "varies_with": varies_with,
        "overrides": overrides,
        "trust": trust,
    }
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def group(panel: str, *, role: Role = "free") -> Any:
    """Declares a rule (see `sd3pipe.rules`) whose fields are options in `panel`, of `role` where they say no other."""
    return Field(json_schema_extra={"panel": panel, "role": role})


def _options_of(group_field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    """Yields name and field of each option that a group holds."""
    rules: Any = group_field.annotation
    shared = group_field.json_schema_extra
    assert isinstance(shared, dict)
    kinds = get_type_hints(rules, include_extras=True)
    for item in dataclasses.fields(rules):
        declared = {**shared, **item.metadata}
        parse = declared.pop("parse", None)
        kind: Any = Annotated[kinds[item.name], BeforeValidator(parse)] if parse else kinds[item.name]
        yield item.name, FieldInfo.from_annotated_attribute(kind, option(item.default, **declared))


def is_foreign_code(value: Any) -> bool:
    """Whether a value names a class by a dotted path that is none of torch's optimizers."""
    return isinstance(value, str) and "." in value and not value.startswith("torch.optim.")


def option_extra(field: FieldInfo) -> dict[str, Any]:
    """Returns what `option` stored beside pydantic's own attributes."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "declare options with option()"
    return extra


def takes_several(field: FieldInfo) -> bool:
    """Returns whether an option takes a list of values; such fields are tuples."""
    return any(get_origin(kind) is tuple for kind in alternatives(field.annotation))


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Returns the types that a union offers, without what Annotated adds to them."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(kind for part in get_args(annotation) for kind in alternatives(part))
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    return (annotation,)
