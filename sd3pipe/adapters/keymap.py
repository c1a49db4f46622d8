"""Module names in adapter files and the native module paths they stand for, in both directions. Free of torch.

A native path is the checkpoint's own ("joint_blocks.0.x_block.attn.qkv"); modules of text encoders are written as
ComfyUI writes them ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1").
Sources: sd-scripts networks/lora_sd3.py, ComfyUI comfy/lora.py, diffusers' SD3Transformer2DModel.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sd3pipe.words import AdapterForm

Form = Literal[AdapterForm, "onetrainer", "lycoris", "native"]
WRITTEN_FORMS: tuple[Form, ...] = get_args(AdapterForm)

# native name below joint_blocks.N -> diffusers names below transformer_blocks.N; three are thirds of a layer's rows
BLOCK_MODULES: Mapping[str, tuple[str, ...]] = {
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
}
OTHER_MODULES: Mapping[str, str] = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_CLIP_MODULES = (
    *(f"text_model.encoder.layers.{{}}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"text_model.encoder.layers.{{}}.mlp.{name}" for name in ("fc1", "fc2")),
    "text_projection",
)
_T5_MODULES = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
_TEXT_ENCODERS = (  # with ComfyUI's and diffusers' starts of a name, the one that is written first
    ("clip_l", ("lora_te1_", "lora_te_"), "text_encoder.", _CLIP_MODULES),
    ("clip_g", ("lora_te2_",), "text_encoder_2.", _CLIP_MODULES),
    ("t5xxl", ("lora_te3_",), "text_encoder_3.", _T5_MODULES),
)
_DIFFUSERS_PREFIXES = ("transformer.", "base_model.model.", "")  # the first is written
_NATIVE_PREFIXES = ("transformer.", "model.diffusion_model.", "base_model.model.", "")
# whatever the form, "blocks", "block" or "layers" stands before the number of a block
_BLOCK_NUMBER = re.compile(r"(?<=blocks[._]|.block[._]|layers[._])(0|[1-9][0-9]{0,2})(?=[._])")


@dataclass(frozen=True, slots=True)
class NativeModule:
    """What a module name in a file stands for: a native module, or the q, k or v rows of a fused one."""

    form: Form
    path: str
    part: int | None = None


def native_block(path: str) -> tuple[int, str] | None:
    """Returns ("joint_blocks.N.NAME" -> N, NAME), or None outside the joint blocks."""
    match = re.fullmatch(r"joint_blocks\.(0|[1-9]\d{0,2})\.(.+)", path)
    return (int(match[1]), match[2]) if match else None


def is_text_encoder(path: str) -> bool:
    return path.startswith("text_encoders.")


def halves_swapped(path: str, depth: int) -> bool:
    """Whether diffusers keeps shift and scale of this modulation the other way round than the native layout."""
    return path in ("final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")


def find_native_module(name: str) -> NativeModule | None:
    """Returns what the module name of any known form stands for, or None."""
    start, number, end = _split(name)
    module = _KNOWN_MODULES.get((start, end))
    return module and replace(module, path=module.path.replace("{}", number))


def module_names(path: str, form: Form) -> tuple[str, ...]:
    """Returns the name of a native module in a form; three names where diffusers splits q, k and v.

    Raises KeyError for a module that the form has no name for.
    """
    start, number, end = _split(path)
    parts = (0, 1, 2) if form == "diffusers" and end.endswith(".qkv") else (None,)
    return tuple(_NAMES[form, start, end, part].replace("{}", number) for part in parts)


def _split(name: str) -> tuple[str, str, str]:
    """Returns what stands before the number of a block, the number, and what stands behind it."""
    match = _BLOCK_NUMBER.search(name)
    return (name, "", "") if match is None else (name[: match.start()], match[0], name[match.end() :])


def _model_names() -> Iterator[tuple[str, NativeModule]]:
    """Yields every name of the model's modules, {} for the number of a block, and what it stands for."""
    modules = {path: [name] for path, name in OTHER_MODULES.items()}
    for path, names in BLOCK_MODULES.items():
        modules[f"joint_blocks.{{}}.{path}"] = [f"transformer_blocks.{{}}.{name}" for name in names]
    for path, names in modules.items():
        yield "lora_unet_" + path.replace(".", "_"), NativeModule("comfyui", path)
        yield "diffusion_model." + path, NativeModule("comfyui-generic", path)
        for index, name in enumerate(names):
            part = index if len(names) > 1 else None
            yield from ((prefix + name, NativeModule("diffusers", path, part)) for prefix in _DIFFUSERS_PREFIXES)
            yield "lora_transformer_" + name.replace(".", "_"), NativeModule("onetrainer", path, part)
            yield "lycoris_" + name.replace(".", "_"), NativeModule("lycoris", path, part)
        for prefix in _NATIVE_PREFIXES:
            yield prefix + path, NativeModule("native", path)
            if len(names) > 1:  # OneTrainer writes q, k and v as qkv.0, qkv.1 and qkv.2
                yield from (
                    (f"{prefix}{path}.{part}", NativeModule("native", path, part)) for part in range(len(names))
                )


def _text_names() -> Iterator[tuple[str, NativeModule]]:
    """Yields every name of the text encoders' modules likewise."""
    for encoder, kohya_prefixes, diffusers_prefix, modules in _TEXT_ENCODERS:
        for module in modules:
            path = f"text_encoders.{encoder}.transformer.{module}"
            yield from ((prefix + module.replace(".", "_"), NativeModule("comfyui", path)) for prefix in kohya_prefixes)
            yield path, NativeModule("comfyui-generic", path)
            yield diffusers_prefix + module, NativeModule("diffusers", path)


def _around_number(name: str) -> tuple[str, str]:
    start, _, end = name.partition("{}")
    return start, end


_KNOWN = [*_model_names(), *_text_names()][::-1]  # so that the first of equal names, and of a module's names, counts
_KNOWN_MODULES = {_around_number(name): module for name, module in _KNOWN}
_NAMES = {(module.form, *_around_number(module.path), module.part): name for name, module in _KNOWN}
