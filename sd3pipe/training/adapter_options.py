"""From options to an AdapterSpec: network_args with sd-scripts' keys, rank rules, learning-rate rules."""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sd3pipe.adapters.dropout import DropoutRates
from sd3pipe.adapters.kinds import check_spec
from sd3pipe.adapters.targets import BLOCK_PARTS, AdapterSpec
from sd3pipe.errors import ParameterError
from sd3pipe.params.resolve import nearest
from sd3pipe.rules.adapter import AdapterRules

T = TypeVar("T", int, float)

_TRUE_AND_FALSE = {"true": True, "false": False}
_REFUSED = {
    "train_t5xxl": "text encoders are not trained: their outputs are cached; use a caption word as trigger instead",
    "conv_dim": "has no effect on SD3; emb_dims trains the patch projection",
    "conv_alpha": "has no effect on SD3; emb_dims trains the patch projection",
    "verbose": "the adapter's modules are listed by `sd3pipe adapter inspect`",
    "loraplus_text_encoder_lr_ratio": "text encoders are not trained: their outputs are cached",
}


def adapter_spec(rules: AdapterRules, *, seed: int) -> AdapterSpec:
    """Returns the adapter that the options describe. Raises ParameterError for unknown or ill-typed network_args."""
    args = network_args(rules.network_args)
    spec = AdapterSpec(
        algorithm=rules.adapter_type,
        rank=rules.network_dim,
        alpha=rules.network_alpha or None,
        rs_lora=args.get("rs_lora", False),
        part_ranks={part: args[f"{part}_dim"] for part in BLOCK_PARTS if f"{part}_dim" in args},
        embedder_ranks=args.get("emb_dims", ()),
        blocks=args.get("train_block_indices", "all"),
        rank_rules=_rules("rank_rules", rules.rank_rules, int),
        learning_rate_rules=_rules("lr_rules", rules.lr_rules, float),
        split_qkv=args.get("split_qkv", False),
        lokr_factor=args.get("lokr_factor", -1),
        dropout=DropoutRates(
            neuron=rules.network_dropout,
            rank=args.get("rank_dropout", 0.0),
            module=args.get("module_dropout", 0.0),
        ),
        seed=seed,
    )
    check_spec(spec)
    return spec


def loraplus_ratio(rules: AdapterRules) -> float:
    """Returns by how much LoRA+ multiplies the learning rate of the up matrices; 1 without LoRA+."""
    args = network_args(rules.network_args)
    return args.get("loraplus_unet_lr_ratio", args.get("loraplus_lr_ratio", 1.0))


def network_args(args: Sequence[str]) -> dict[str, Any]:
    """Returns the KEY=VALUE pairs with their values' types. Raises ParameterError for all that is wrong at once."""
    parsed: dict[str, Any] = {}
    problems = []
    for arg in args:
        key, separator, text = arg.partition("=")
        if not separator:
            problems.append(f"network_args: {arg}: write KEY=VALUE")
        elif key in _REFUSED:
            problems.append(f"network_args: {key}: not supported: {_REFUSED[key]}")
        elif key not in _TYPES:
            problems.append(f"network_args: {key}: unknown{nearest(key, _TYPES)}")
        else:
            try:
                parsed[key] = _TYPES[key](text)
            except (ValueError, SyntaxError):
                problems.append(f"network_args: {arg}: {text!r} is no value for {key}")
    if problems:
        raise ParameterError("\n".join(problems))
    return parsed


def _flag(text: str) -> bool:
    if text.lower() not in _TRUE_AND_FALSE:
        raise ValueError(text)
    return _TRUE_AND_FALSE[text.lower()]


def _integers(text: str) -> tuple[int, ...]:
    values = ast.literal_eval(text)
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(text)
    return tuple(values)


_TYPES: Mapping[str, Callable[[str], Any]] = {
    **{f"{part}_dim": int for part in BLOCK_PARTS},
    "emb_dims": _integers,
    "train_block_indices": str,
    "split_qkv": _flag,
    "rank_dropout": float,
    "module_dropout": float,
    "loraplus_lr_ratio": float,
    "loraplus_unet_lr_ratio": float,
    "rs_lora": _flag,
    "lokr_factor": int,
}


def _rules(option: str, rules: Sequence[str], kind: Callable[[str], T]) -> tuple[tuple[str, T], ...]:
    """Returns (pattern, value) of PATTERN=VALUE; the pattern itself may hold equals signs."""
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
