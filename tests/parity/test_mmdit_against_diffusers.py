"""The MMDiT computes what diffusers' SD3Transformer2DModel computes: output and gradients of every input.

The map of keys is stated here once more, from the tables of the formats, independently of the package's own.
"""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from support.tiny_mmdit import random_inputs, random_weights, tiny_architecture, tiny_mmdit

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
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


def _oracle(variant, dtype):
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


def _ours(variant, dtype):
    return tiny_mmdit(variant, dtype=dtype)


def _output_and_gradients(predict, inputs, dtype):
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("latents_BChw", "context_BLD", "pooled_BP")}
    velocity = predict(**(inputs | leaves))
    direction = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    gradients = torch.autograd.grad((velocity * direction).sum(), list(leaves.values()))
    return {"velocity": velocity.detach(), **dict(zip(leaves, gradients, strict=True))}


def _call_oracle(oracle):
    def predict(latents_BChw, timesteps_B, context_BLD, pooled_BP):
        return oracle(
            hidden_states=latents_BChw,
            timestep=timesteps_B,
            encoder_hidden_states=context_BLD,
            pooled_projections=pooled_BP,
            return_dict=False,
        )[0]

    return predict


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_input_gradients_equal_the_oracles(variant, dtype, tolerance):
    ours, oracle = _ours(variant, dtype), _call_oracle(_oracle(variant, dtype))
    for batch in (1, 3):
        for height, width in ((8, 8), (8, 12), (12, 8)):  # square, 3:2 and 2:3
            inputs = random_inputs(batch=batch, height=height, width=width, dtype=dtype)
            expected = _output_and_gradients(oracle, inputs, dtype)
            found = _output_and_gradients(ours, inputs, dtype)
            for name, tensor in expected.items():
                assert tensor.norm() > 1, f"{name} says nothing"
                error = (found[name] - tensor).norm() / tensor.norm()
                assert error < tolerance, f"{name} at batch {batch}, {height} x {width}"


def test_second_attention_has_heads_of_64(monkeypatch):
    """With 64 heads of D / 64, as sd-scripts runs it, the model is another one: parity does tell them apart."""
    from sd3pipe.models import joint_block

    model, inputs = _ours("sd35-medium", torch.float32), random_inputs()
    right = model(**inputs)
    plain = joint_block.attend

    def transposed_heads(q, k, v):
        if q.shape[2] != 16:  # the joint attention has text tokens, too
            return plain(q, k, v)
        q, k, v = (t.transpose(1, 2).flatten(2).unflatten(-1, (64, -1)).transpose(1, 2) for t in (q, k, v))
        return plain(q, k, v)

    monkeypatch.setattr(joint_block, "attend", transposed_heads)
    assert (model(**inputs) - right).norm() / right.norm() > 1e-2
