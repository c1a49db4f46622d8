"""From options to an AdapterSpec."""

from sd3pipe.adapters.dropout import DropoutRates
from sd3pipe.adapters.kinds import check_spec
from sd3pipe.adapters.targets import BLOCK_PARTS, AdapterSpec, BlockPart
from sd3pipe.errors import ParameterError
from sd3pipe.rules.adapter import AdapterRules
from sd3pipe.training.key_values import network_args, pattern_rules

_LAYERS: dict[str, tuple[BlockPart, ...]] = {
    "attention": ("context_attn", "x_attn"),
    "mlp": ("context_mlp", "x_mlp"),
    "modulation": ("context_mod", "x_mod"),
    **{part: (part,) for part in BLOCK_PARTS},
}


def adapter_spec(rules: AdapterRules, *, seed: int) -> AdapterSpec:
    """Returns the adapter that the options describe. Raises ParameterError for unknown or ill-typed network_args."""
    args = network_args(rules.network_args)
    given: dict[BlockPart, int | None] = {part: getattr(args, f"{part}_dim") for part in BLOCK_PARTS}
    ranks: dict[BlockPart, int] = {part: rank for part, rank in given.items() if rank is not None}
    spec = AdapterSpec(
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
    check_spec(spec)
    return spec


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


def loraplus_ratio(rules: AdapterRules) -> float:
    """Returns by how much LoRA+ multiplies the learning rate of the up matrices; 1 without LoRA+."""
    args = network_args(rules.network_args)
    return args.loraplus_lr_ratio if args.loraplus_unet_lr_ratio is None else args.loraplus_unet_lr_ratio
