"""From options to an AdapterSpec: network_args with sd-scripts' keys, rules for ranks and rates. Free of torch."""

import ast
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from sd3pipe.adapters.targets import BLOCK_PARTS, AdapterSpec, BlockPart, DropoutRates
from sd3pipe.errors import ParameterError
from sd3pipe.problems import check_table
from sd3pipe.rules.adapter import AdapterRules

T = TypeVar("T", int, float)
Rate = Annotated[float, Field(ge=0, lt=1)]

_REFUSED = {
    "train_t5xxl": "text encoders are not trained: their outputs are cached; use a caption word as trigger instead",
    "conv_dim": "has no effect on SD3; emb_dims trains the patch projection",
    "conv_alpha": "has no effect on SD3; emb_dims trains the patch projection",
    "verbose": "the adapter's modules are listed by `sd3pipe adapter inspect`",
    "loraplus_text_encoder_lr_ratio": "text encoders are not trained: their outputs are cached",
}


_LAYERS: dict[str, tuple[BlockPart, ...]] = {
    "attention": ("context_attn", "x_attn"),
    "mlp": ("context_mlp", "x_mlp"),
    "modulation": ("context_mod", "x_mod"),
    **{part: (part,) for part in BLOCK_PARTS},
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


def described_adapter(rules: AdapterRules, *, seed: int = 0) -> AdapterSpec:
    """Returns the adapter that the options describe, whether or not its kind has them all.

    Raises ParameterError for unknown or ill-typed network_args.
    """
    args = network_args(rules.network_args)
    given: dict[BlockPart, int | None] = {part: getattr(args, f"{part}_dim") for part in BLOCK_PARTS}
    ranks: dict[BlockPart, int] = {part: rank for part, rank in given.items() if rank is not None}
    return AdapterSpec(
        algorithm=rules.adapter_type,
        rank=rules.network_dim,
        alpha=rules.network_alpha or None,
        rs_lora=args.rs_lora,
        part_ranks=_left_out(rules.train_layers) | ranks,
        embedder_ranks=args.emb_dims,
        blocks=args.train_block_indices,
        rank_rules=pattern_rules("rank_rules", rules.rank_rules, int),
        learning_rate_rules=pattern_rules("lr_rules", rules.lr_rules, float),
        split_qkv=args.split_qkv,
        lokr_factor=args.lokr_factor,
        tlora_min_rank=args.tlora_min_rank,
        dropout=DropoutRates(neuron=rules.network_dropout, rank=args.rank_dropout, module=args.module_dropout),
        seed=seed,
    )


def _left_out(train_layers: str) -> dict[BlockPart, int]:
    """Returns rank 0 for the parts of the blocks that --train-layers does not name. Raises ParameterError."""
    if train_layers == "all":
        return {}
    words = [word.strip() for word in train_layers.split("+")]
    unknown = [word for word in words if word not in _LAYERS]
    if unknown:
        raise ParameterError(f"train_layers: {unknown[0]!r} is none of all, {', '.join(_LAYERS)}; + joins several")
    chosen = {part for word in words for part in _LAYERS[word]}
    return {part: 0 for part in BLOCK_PARTS if part not in chosen}


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
    """Returns (pattern, value) of PATTERN=VALUE; the pattern itself may hold equals signs. Raises ParameterError."""
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
