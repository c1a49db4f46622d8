"""Writes a tiny base model as a diffusers folder: configurations, component folders, tokenizers."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3pipe.files import write_json
from sd3pipe.models.diffusers_keys import DiffusersModules, diffusers_names, mmdit_modules, vae_modules
from sd3pipe.models.text_architecture import CLIP_ACTIVATIONS, ClipArchitecture, T5Architecture
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.words import ClipName
from support.tiny_base_architecture import TinyArchitecture

Tensors = dict[str, Tensor]

_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def write_diffusers_folder(
    folder: Path, architecture: TinyArchitecture, parts: Mapping[str, Tensors], tokenizers: Path
) -> None:
    """Writes what StableDiffusion3Pipeline.from_pretrained reads. `parts` has native keys."""
    index = {name: list(kind) for name, kind in _PARTS.items()}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **index})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_mmdit(folder / "transformer", architecture, parts["mmdit"])
    _write_vae(folder / "vae", architecture, parts["vae"])
    _write_clip(folder / "text_encoder", architecture.clip_l, "clip_l", parts["clip_l"])
    _write_clip(folder / "text_encoder_2", architecture.clip_g, "clip_g", parts["clip_g"])
    _write_t5(folder / "text_encoder_3", architecture.t5xxl, parts["t5xxl"])
    targets = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
    for encoder, source in find_tokenizers(folder=tokenizers).items():
        shutil.copytree(source, folder / targets[encoder], dirs_exist_ok=True, copy_function=shutil.copyfile)


def _write_mmdit(folder: Path, architecture: TinyArchitecture, tensors: Tensors) -> None:
    mmdit = architecture.mmdit
    config = {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": mmdit.width,
        "dual_attention_layers": list(mmdit.dual_attention_blocks),
        "in_channels": mmdit.in_channels,
        "joint_attention_dim": mmdit.context_width,
        "num_attention_heads": mmdit.heads,
        "num_layers": mmdit.depth,
        "out_channels": mmdit.in_channels,
        "patch_size": mmdit.patch_size,
        "pooled_projection_dim": mmdit.pooled_width,
        "pos_embed_max_size": mmdit.pos_embed_max,
        "qk_norm": "rms_norm" if mmdit.qk_norm else None,
        "sample_size": mmdit.pos_embed_max,
    }
    write_json(folder / "config.json", config)
    renamed = _renamed(tensors, mmdit_modules(mmdit.depth))
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_vae(folder: Path, architecture: TinyArchitecture, tensors: Tensors) -> None:
    vae = architecture.vae
    levels = len(vae.level_widths)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(vae.level_widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.blocks_per_level,
        "norm_num_groups": 32,
        "out_channels": vae.image_channels,
        "sample_size": 512,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    write_json(folder / "config.json", config)
    renamed = _renamed(tensors, vae_modules(levels, vae.blocks_per_level))
    squeezed = {key: value.flatten(1) if _is_attention(key) else value for key, value in renamed.items()}
    save_file(squeezed, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _is_attention(key: str) -> bool:
    """Whether diffusers holds this native 1x1 convolution as a linear layer."""
    return ".attentions." in key and ".group_norm." not in key and key.endswith(".weight")


def _write_clip(folder: Path, clip: ClipArchitecture, name: ClipName, tensors: Tensors) -> None:
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # the genuine files' value, by which the pooled state is taken at the largest id
        "hidden_act": CLIP_ACTIVATIONS[name],
        "hidden_size": clip.width,
        "intermediate_size": clip.mlp_width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": clip.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": clip.heads,
        "num_hidden_layers": clip.depth,
        "pad_token_id": 1,
        "projection_dim": clip.pooled_width,
        "dtype": "float16",
        "vocab_size": clip.vocabulary,
    }
    write_json(folder / "config.json", config)
    identity = {"text_projection.weight": torch.eye(clip.width, dtype=torch.float16)}
    save_file(identity | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_t5(folder: Path, t5: T5Architecture, tensors: Tensors) -> None:
    """Writes T5 in two shards with an index, as the public folders have it."""
    config = {
        "architectures": ["T5EncoderModel"],
        "d_ff": t5.mlp_width,
        "d_kv": 64,
        "d_model": t5.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": t5.heads,
        "num_layers": t5.depth,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": t5.distance_buckets,
        "tie_word_embeddings": False,
        "dtype": "float16",
        "use_cache": True,
        "vocab_size": t5.vocabulary,
    }
    write_json(folder / "config.json", config)
    keys = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _renamed(tensors: Tensors, modules: Mapping[str, DiffusersModules]) -> Tensors:
    """Returns native tensors under diffusers' names: split by rows, or with their row halves exchanged."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        made_of = diffusers_names(key, modules)
        assert made_of is not None, key
        if made_of.halves_swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        rows = tensor.chunk(len(made_of.names)) if len(made_of.names) > 1 else (tensor,)
        renamed |= {name: part.contiguous() for name, part in zip(made_of.names, rows, strict=True)}
    return renamed
