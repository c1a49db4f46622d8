"""Module names in adapter files and the native module paths they stand for, in both directions. Free of torch.

A native path is the checkpoint's own ("joint_blocks.0.x_block.attn.qkv"); modules of text encoders are written as
ComfyUI writes them ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1").
Sources: sd-scripts networks/lora_sd3.py, ComfyUI comfy/lora.py, diffusers' SD3Transformer2DModel.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")

_BLOCK_UNDERSCORED = {native.replace(".", "_"): native for native in BLOCK_MODULES}
_OTHER_UNDERSCORED = {native.replace(".", "_"): native for native in OTHER_MODULES}
_CLIP_MODULES = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5_MODULES = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
_DIFFUSERS_PREFIXES = ("transformer.", "base_model.model.", "")
_NATIVE_PREFIXES = ("transformer.", "model.diffusion_model.", "base_model.model.", "")
_UNDERSCORED_DIFFUSERS: Mapping[str, Form] = {"lora_transformer_": "onetrainer", "lycoris_": "lycoris"}
_DIFFUSERS_TEXT = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}


@dataclass(frozen=True, slots=True)
class Place:
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


def find_place(name: str) -> Place | None:
    """Returns what the module name of any known form stands for, or None."""
    return (
        _kohya_place(name)
        or _generic_place(name)
        or _diffusers_place(name)
        or _underscored_place(name)
        or _native_place(name)
    )


def module_names(path: str, form: Form) -> tuple[str, ...]:
    """Returns the name of a native module in a form that is written; three names where diffusers splits q, k and v.

    Raises KeyError for a module that the form has no name for.
    """
    if is_text_encoder(path):
        return (_text_encoder_name(path, form),)
    match form:
        case "comfyui":
            return ("lora_unet_" + path.replace(".", "_"),)
        case "comfyui-generic":
            return ("diffusion_model." + path,)
        case "diffusers":
            return tuple("transformer." + name for name in _diffusers_names(path))
        case _:
            raise KeyError(f"{form} is not written")


def _diffusers_names(path: str) -> tuple[str, ...]:
    block = native_block(path)
    if block is None:
        return (OTHER_MODULES[path],)
    return tuple(f"transformer_blocks.{block[0]}.{name}" for name in BLOCK_MODULES[block[1]])


def _kohya_place(name: str) -> Place | None:
    if name.startswith("lora_unet_"):
        path = _native_from_underscores(name.removeprefix("lora_unet_"))
        return Place("comfyui", path) if path else None
    match = re.fullmatch(r"lora_te([123]?)_(.+)", name)
    if match is None:
        return None
    encoder = TEXT_ENCODERS[int(match[1] or 1) - 1]
    path = _text_encoder_path(match[2], encoder)
    return Place("comfyui", f"text_encoders.{encoder}.transformer.{path}") if path else None


def _generic_place(name: str) -> Place | None:
    path = name.removeprefix("diffusion_model.")
    if path != name and _is_native(path):
        return Place("comfyui-generic", path)
    match = re.fullmatch(r"text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.(.+)", name)
    if match and _text_encoder_path(match[2].replace(".", "_"), match[1]) == match[2]:
        return Place("comfyui-generic", name)
    return None


def _diffusers_place(name: str) -> Place | None:
    for encoder, prefix in _DIFFUSERS_TEXT.items():
        path = name.removeprefix(prefix + ".")
        if path != name and _text_encoder_path(path.replace(".", "_"), encoder) == path:
            return Place("diffusers", f"text_encoders.{encoder}.transformer.{path}")
    prefix = next(prefix for prefix in _DIFFUSERS_PREFIXES if name.startswith(prefix))
    return _from_diffusers("diffusers", name.removeprefix(prefix), _DOTTED)


def _underscored_place(name: str) -> Place | None:
    for prefix, form in _UNDERSCORED_DIFFUSERS.items():
        if name.startswith(prefix):
            return _from_diffusers(form, name.removeprefix(prefix), _UNDERSCORED)
    return None


def _native_place(name: str) -> Place | None:
    """Finds the checkpoint's own names, as OneTrainer writes them: with q, k and v as qkv.0, qkv.1 and qkv.2."""
    prefix = next(prefix for prefix in _NATIVE_PREFIXES if name.startswith(prefix))
    path = name.removeprefix(prefix)
    if _is_native(path):
        return Place("native", path)
    fused, _, part = path.rpartition(".")
    if fused.endswith(".qkv") and part in ("0", "1", "2") and _is_native(fused):
        return Place("native", fused, int(part))
    return None


@dataclass(frozen=True, slots=True)
class _DiffusersTable:
    """diffusers module names, dotted or underscored, with the native name and part each stands for."""

    block: re.Pattern[str]
    in_block: Mapping[str, tuple[str, int | None]]
    outside: Mapping[str, str]


def _table(separator: str) -> _DiffusersTable:
    in_block = {
        name.replace(".", separator): (native, part if len(names) > 1 else None)
        for native, names in BLOCK_MODULES.items()
        for part, name in enumerate(names)
    }
    outside = {name.replace(".", separator): native for native, name in OTHER_MODULES.items()}
    dot = re.escape(separator)
    return _DiffusersTable(re.compile(rf"transformer_blocks{dot}(0|[1-9]\d{{0,2}}){dot}(.+)"), in_block, outside)


_DOTTED, _UNDERSCORED = _table("."), _table("_")


def _from_diffusers(form: Form, name: str, table: _DiffusersTable) -> Place | None:
    if name in table.outside:
        return Place(form, table.outside[name])
    match = table.block.fullmatch(name)
    if match is None or match[2] not in table.in_block:
        return None
    native, part = table.in_block[match[2]]
    return Place(form, f"joint_blocks.{int(match[1])}.{native}", part)


def _is_native(path: str) -> bool:
    block = native_block(path)
    return path in OTHER_MODULES if block is None else block[1] in BLOCK_MODULES


def _native_from_underscores(name: str) -> str | None:
    match = re.fullmatch(r"joint_blocks_(0|[1-9]\d{0,2})_(.+)", name)
    if match is None:
        return _OTHER_UNDERSCORED.get(name)
    native = _BLOCK_UNDERSCORED.get(match[2])
    return native and f"joint_blocks.{int(match[1])}.{native}"


def _text_encoder_name(path: str, form: Form) -> str:
    _, encoder, _, module = path.split(".", 3)
    match form:
        case "comfyui":
            return f"lora_te{TEXT_ENCODERS.index(encoder) + 1}_{module.replace('.', '_')}"
        case "comfyui-generic":
            return path
        case "diffusers":
            return f"{_DIFFUSERS_TEXT[encoder]}.{module}"
        case _:
            raise KeyError(f"{form} is not written")


def _text_encoder_path(underscored: str, encoder: str) -> str | None:
    """Returns the dotted module path inside a text encoder for its underscored name."""
    if encoder == "t5xxl":
        layers, modules = r"encoder_block_(0|[1-9]\d{0,2})_(.+)", _T5_MODULES
        start = "encoder.block"
    else:
        layers, modules = r"text_model_encoder_layers_(0|[1-9]\d{0,2})_(.+)", _CLIP_MODULES
        start = "text_model.encoder.layers"
        if underscored == "text_projection":
            return underscored
    match = re.fullmatch(layers, underscored)
    known = {module.replace(".", "_"): module for module in modules}
    if match is None or match[2] not in known:
        return None
    return f"{start}.{int(match[1])}.{known[match[2]]}"
