"""What an adapter is like: kind, ranks, where it stands, how fast its parts learn."""

from dataclasses import dataclass

from sd3pipe.rules.declaring import rule
from sd3pipe.words import Algorithm

# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRules:
    """The adapter as the user describes it; `sd3pipe.adapters.options` reads it."""

    network_dim: int = rule(16, "Rank of the adapter; of an OFT the largest width of its blocks.", ge=1)
    network_alpha: float | None = rule(
        None, "Strength is alpha / rank; default (or 0): the rank, so strength 1. Of an OFT how far it may turn; "
        "default (or 0): as far as it likes.", ge=0,
    )
    adapter_type: Algorithm = rule("lora", "Kind of adapter.")
    train_layers: str = rule(
        "all", "Layers of the blocks that the adapter stands on: all, or parts joined by +: attention, mlp, "
        "modulation, x_attn, x_mlp, x_mod, context_attn, context_mlp, context_mod; network_args gives parts ranks.",
    )
    network_dropout: float = rule(
        0.0, "Share of rank activations dropped while training.", advanced=True, ge=0, lt=1
    )
    network_args: tuple[str, ...] = rule(
        (), "More about the adapter, as KEY=VALUE: context_attn_dim, context_mlp_dim, context_mod_dim, x_attn_dim, "
        "x_mlp_dim, x_mod_dim, emb_dims, train_block_indices, split_qkv, rank_dropout, module_dropout, "
        "loraplus_lr_ratio, rs_lora, lokr_factor, tlora_min_rank.", advanced=True,
    )
    rank_rules: tuple[str, ...] = rule(
        (), "PATTERN=RANK for modules whose path the regular expression is found in; 0 leaves them out.", advanced=True
    )
    lr_rules: tuple[str, ...] = rule(
        (), "PATTERN=RATE: learning rate of the modules whose path the regular expression is found in.", advanced=True
    )
