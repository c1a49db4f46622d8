"""How a rule declares its options: a field of a frozen dataclass that carries default, help and range.

A rule is what a part of training takes. Its fields are named as the options are, and `sd3pipe.params` makes the
options from them, so that each stands once.
"""

from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sd3pipe.errors import ParameterError


def rule(default: Any, help: str, **declared: Any) -> Any:
    """Declares one option; `declared` is what `sd3pipe.params.fields.option` takes beside default and help.

    Its `parse` turns a word of the command line or of a file into a value, and hands on what is none of its business.
    """
    return field(default=default, metadata={"help": help, **declared})


def check_words(rules: Any) -> None:
    """Raises ParameterError for a word that is none of those which a rule's field may hold."""
    for name, kind in get_type_hints(type(rules)).items():
        value, known = getattr(rules, name), get_args(kind)
        if get_origin(kind) is Literal and value not in known:
            raise ParameterError(f"{name} = {value}: one of {', '.join(known)}")
