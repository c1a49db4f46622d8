"""diffusers' SD3Transformer2DModel with a tiny MMDiT's weights, as an oracle.

The map of keys is stated here once more, from the tables of the formats, independently of the package's own.
"""

import torch
from diffusers import SD3Transformer2DModel

from support.tiny_mmdit import random_weights, tiny_architecture

TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
IN_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
THIRDS = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def _diffusers_weights(native, depth):
    weights = {"pos_embed.pos_embed": native["pos_embed"]}
    swapped = {"final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"}
    for key, tensor in native.items():
        if key == "pos_embed":
            continue
        name, kind = key.rsplit(".", 1)
        if name in swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if name in TOP:
            weights[f"{TOP[name]}.{kind}"] = tensor
            continue
        _, index, inner = name.split(".", 2)
        block = f"transformer_blocks.{index}"
        if inner in THIRDS:
            for part, third in zip(THIRDS[inner], tensor.chunk(3), strict=True):
                weights[f"{block}.{part}.{kind}"] = third
        else:
            weights[f"{block}.{IN_BLOCK[inner]}.{kind}"] = tensor
    return weights


def diffusers_mmdit(variant: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Returns diffusers' model with the weights of `tiny_mmdit(variant)`."""
    a = tiny_architecture(variant)
    model = SD3Transformer2DModel(
        sample_size=a.pos_embed_max * 2,
        num_layers=a.depth,
        num_attention_heads=a.heads,
        attention_head_dim=64,
        joint_attention_dim=a.context_width,
        caption_projection_dim=a.width,
        pooled_projection_dim=a.pooled_width,
        pos_embed_max_size=a.pos_embed_max,
        dual_attention_layers=a.dual_attention_blocks,
        qk_norm="rms_norm" if a.qk_norm else None,
    )
    model.load_state_dict(_diffusers_weights(random_weights(a), a.depth), strict=True)
    return model.to(dtype)


def their_names(path: str) -> list[str]:
    """Returns diffusers' layers that stand for one of ours."""
    _, index, inner = path.split(".", 2)
    names = THIRDS.get(inner, (IN_BLOCK.get(inner),))
    return [f"transformer_blocks.{index}.{name}" for name in names]
