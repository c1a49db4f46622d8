"""What an option's words of the form KEY=VALUE say: of the adapter, by sd-scripts' keys, and of the optimizer.

Free of torch.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from sd3pipe.errors import ParameterError
from sd3pipe.problems import check_table

T = TypeVar("T", int, float)
Rate = Annotated[float, Field(ge=0, lt=1)]

_REFUSED = {
    "train_t5xxl": "text encoders are not trained: their outputs are cached; use a caption word as trigger instead",
    "conv_dim": "has no effect on SD3; emb_dims trains the patch projection",
    "conv_alpha": "has no effect on SD3; emb_dims trains the patch projection",
    "verbose": "the adapter's modules are listed by `sd3pipe adapter inspect`",
    "loraplus_text_encoder_lr_ratio": "text encoders are not trained: their outputs are cached",
}


def _listed(text: Any) -> Any:
    """Returns "[1, 2]" as the numbers in it."""
    try:
        return tuple(ast.literal_eval(text)) if isinstance(text, str) else text
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError("must be a list of whole numbers, such as [0,0,0,0,0,8]") from error


class NetworkArgs(BaseModel):
    """What --network-args may say, by sd-scripts' keys. None means: as the adapter is otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_attn_dim: int | None = None
    context_mlp_dim: int | None = None
    context_mod_dim: int | None = None
    x_attn_dim: int | None = None
    x_mlp_dim: int | None = None
    x_mod_dim: int | None = None
    emb_dims: Annotated[tuple[StrictInt, ...], BeforeValidator(_listed)] = ()
    train_block_indices: str = "all"
    split_qkv: bool = False
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    loraplus_lr_ratio: float = 1.0
    loraplus_unet_lr_ratio: float | None = None
    rs_lora: bool = False
    lokr_factor: int = -1
    tlora_min_rank: int = 1


def network_args(args: Sequence[str]) -> NetworkArgs:
    """Returns the KEY=VALUE pairs with their values' types. Raises ParameterError for all that is wrong at once."""
    given = dict(arg.split("=", 1) for arg in args if "=" in arg)
    parsed, wrong = check_table(
        NetworkArgs, given, explain=lambda key: f"not supported: {_REFUSED[key]}" if key in _REFUSED else None
    )
    problems = [*wrong.values(), *(f"{arg}: write KEY=VALUE" for arg in args if "=" not in arg)]
    if parsed is None or problems:
        raise ParameterError("\n".join(f"network_args: {problem}" for problem in problems))
    return parsed


def pattern_rules(option: str, rules: Sequence[str], kind: Callable[[str], T]) -> tuple[tuple[str, T], ...]:
    """Returns (pattern, value) of PATTERN=VALUE; the pattern itself may hold equals signs.

    Raises ParameterError.
    """
    parsed = []
    for rule in rules:
        pattern, separator, value = rule.rpartition("=")
        try:
            parsed.append((pattern, kind(value)))
        except ValueError:
            separator = ""
        if not separator or not pattern:
            raise ParameterError(f"{option}: {rule}: write PATTERN=VALUE, such as attn.qkv=8")
    return tuple(parsed)


def parse_args(option: str, args: Sequence[str]) -> dict[str, object]:
    """Returns key=value pairs with the values read as Python literals. Raises ParameterError."""
    parsed: dict[str, object] = {}
    for arg in args:
        key, separator, value = arg.partition("=")
        if not separator:
            raise ParameterError(f"{option}: {arg}: write key=value")
        try:
            parsed[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ParameterError(f"{option}: {arg}: {value!r} is not a number, True, False, None or a tuple") from error
    return parsed
