"""The MMDiT computes what diffusers' SD3Transformer2DModel computes: output and gradients of every input."""

import pytest
import torch
from support.diffusers_mmdit import diffusers_mmdit
from support.tiny_mmdit import random_inputs, tiny_mmdit

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]


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


@pytest.mark.long
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_input_gradients_equal_the_oracles(variant, dtype, tolerance):
    ours, oracle = _ours(variant, dtype), _call_oracle(diffusers_mmdit(variant, dtype))
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
