"""diffusers and peft predict with our exported files what the model with our adapter attached predicts."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from support.comparing import relative_error
from support.diffusers_mmdit import diffusers_mmdit
from support.random_adapters import random_adapter
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.adapters.files import read_adapter, save_adapter
from sd3pipe.adapters.find import find_adapter
from sd3pipe.adapters.network import attach, attach_deltas
from sd3pipe.adapters.targets import AdapterSpec

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
TOLERANCE = 1e-4  # issue's bound on the relative error of the prediction in fp32; about 1e-6 is measured


def theirs(model, inputs):
    with torch.no_grad():
        return model(
            hidden_states=inputs["latents_BChw"],
            timestep=inputs["timesteps_B"],
            encoder_hidden_states=inputs["context_BLD"],
            pooled_projections=inputs["pooled_BP"],
            return_dict=False,
        )[0]


def pipeline(transformer):
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("every", [1, 3])
def test_pipeline_with_the_exported_file_predicts_the_same(tmp_path, variant, kind, every):
    adapter, inputs = random_adapter(tiny_architecture(variant), kind, every=every), random_inputs()
    save_adapter(tmp_path / "lora.safetensors", adapter, form="diffusers")
    ours, oracle = tiny_mmdit(variant), diffusers_mmdit(variant, torch.float32)
    before = theirs(oracle, inputs)
    attach_deltas(ours, adapter)
    pipeline(oracle).load_lora_weights(tmp_path / "lora.safetensors")
    prediction = theirs(oracle, inputs)
    assert relative_error(ours(**inputs), prediction) < TOLERANCE
    assert relative_error(before, prediction) > 0.05


def test_a_trained_split_adapter_keeps_its_small_ranks(tmp_path):
    ours, oracle, inputs = tiny_mmdit("sd35-medium"), diffusers_mmdit("sd35-medium", torch.float32), random_inputs()
    network = attach(ours, AdapterSpec(rank=4, alpha=2.0, split_qkv=True))
    for layer in network.layers.values():
        torch.nn.init.normal_(layer.up, std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(tmp_path / "lora.safetensors", network.deltas(), form="diffusers")
    assert {t.shape[0] for name, t in load_file(tmp_path / "lora.safetensors").items() if "lora_A" in name} == {4}
    pipeline(oracle).load_lora_weights(tmp_path / "lora.safetensors")
    assert relative_error(ours(**inputs), theirs(oracle, inputs)) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_alone_predicts_the_same(tmp_path, variant):
    adapter, inputs = random_adapter(tiny_architecture(variant), every=2), random_inputs()
    adapter = {path: delta for path, delta in adapter.items() if delta.rank == 3}
    save_adapter(tmp_path / "lora.safetensors", adapter, form="diffusers")
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(tmp_path / "lora.safetensors").items()}
    oracle = diffusers_mmdit(variant, torch.float32)
    targets = sorted({key.split(".lora_")[0] for key in tensors})
    model = get_peft_model(oracle, LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    result = set_peft_model_state_dict(model, {f"base_model.model.{key}": t for key, t in tensors.items()})
    assert not result.unexpected_keys
    ours = tiny_mmdit(variant)
    attach_deltas(ours, adapter)
    assert relative_error(ours(**inputs), theirs(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("every", [1, 2])
def test_what_diffusers_saves_is_read(tmp_path, every):
    """Also with a strength of alpha / rank in the metadata, which ComfyUI would not see."""
    oracle, ours, inputs = diffusers_mmdit("sd35-medium", torch.float32), tiny_mmdit("sd35-medium"), random_inputs()
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_v", "attn.to_out.0", "norm1_context.linear", "proj_out"]
    )
    oracle.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in oracle.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    layers = {name: t for name, t in oracle.state_dict().items() if "lora_" in name}
    layers = {f"{name.replace('.default', '')}": tensor for name, tensor in layers.items()}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    read = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {delta.scale for delta in read.adapter.values()} == {0.5}
    attach_deltas(ours, read.adapter)
    assert relative_error(ours(**inputs), theirs(oracle, inputs)) < TOLERANCE


def test_a_folder_that_peft_saves_is_read_at_its_strength(tmp_path):
    oracle, ours, inputs = diffusers_mmdit("sd35-large", torch.float32), tiny_mmdit("sd35-large"), random_inputs()
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_k", "ff.net.2", "norm_out.linear"])
    model = get_peft_model(oracle, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(tmp_path)
    read = read_adapter(find_adapter(tmp_path))
    assert {delta.scale for delta in read.adapter.values()} == {1.5}
    attach_deltas(ours, read.adapter)
    assert relative_error(ours(**inputs), theirs(model, inputs)) < TOLERANCE
