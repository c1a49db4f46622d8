"""The names that diffusers gives to the tensors of the MMDiT and the VAE, in both directions. Free of torch.

A native module is one diffusers module, three whose rows follow one another (q, k, v), or one whose two row halves are
exchanged (shift and scale of a modulation). So a native tensor is always a row of byte ranges, never a sum.
Source: diffusers' SD3Transformer2DModel and AutoencoderKL; values checked against their own converters in the tests.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sd3pipe.models.layouts import Component
from sd3pipe.models.shapes import count_numbered


@dataclass(frozen=True, slots=True)
class DiffusersModules:
    """The diffusers modules that make up one native module; their rows follow one another."""

    names: tuple[str, ...]
    halves_swapped: bool = False


ModuleMap = Mapping[str, DiffusersModules]

_SIDE_X = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.ln_q": ("attn.norm_q",),
    "attn.ln_k": ("attn.norm_k",),
    "attn.proj": ("attn.to_out.0",),
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.ln_q": ("attn2.norm_q",),
    "attn2.ln_k": ("attn2.norm_k",),
    "attn2.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_SIDE_CONTEXT = {
    "adaLN_modulation.1": ("norm1_context.linear",),
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.ln_q": ("attn.norm_added_q",),
    "attn.ln_k": ("attn.norm_added_k",),
    "attn.proj": ("attn.to_add_out",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
}
_OUTSIDE_BLOCKS = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def mmdit_modules(depth: int) -> dict[str, DiffusersModules]:
    """Returns every module that an MMDiT of this depth can have, by native path."""
    modules = {native: DiffusersModules((theirs,)) for native, theirs in _OUTSIDE_BLOCKS.items()}
    for index in range(depth):
        for side, table in (("x_block", _SIDE_X), ("context_block", _SIDE_CONTEXT)):
            for native, theirs in table.items():
                names = tuple(f"transformer_blocks.{index}.{name}" for name in theirs)
                # the last context block has shift and scale alone, which diffusers' AdaLayerNormContinuous exchanges
                swapped = side == "context_block" and native == "adaLN_modulation.1" and index == depth - 1
                modules[f"joint_blocks.{index}.{side}.{native}"] = DiffusersModules(names, swapped)
    modules["final_layer.adaLN_modulation.1"] = DiffusersModules(("norm_out.linear",), halves_swapped=True)
    return modules


def vae_modules(levels: int, blocks: int) -> dict[str, DiffusersModules]:
    """Returns every module of a VAE with so many resolution levels and encoder blocks a level, by native path."""
    names: dict[str, str] = {}
    for part in ("encoder", "decoder"):
        names |= {f"{part}.conv_in": f"{part}.conv_in", f"{part}.conv_out": f"{part}.conv_out"}
        names[f"{part}.norm_out"] = f"{part}.conv_norm_out"
        for number in (1, 2):
            names |= _prefixed(_RESNET, f"{part}.mid.block_{number}", f"{part}.mid_block.resnets.{number - 1}")
        names |= _prefixed(_VAE_ATTENTION, f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(blocks):
            names |= _prefixed(_RESNET, f"encoder.down.{level}.block.{block}", f"{down}.resnets.{block}")
        for block in range(blocks + 1):  # the decoder has one block more a level
            names |= _prefixed(_RESNET, f"decoder.up.{level}.block.{block}", f"{up}.resnets.{block}")
        names[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return {native: DiffusersModules((theirs,)) for native, theirs in names.items()}


def modules_of(component: Component, names: Collection[str]) -> dict[str, DiffusersModules]:
    """Returns the module map for the MMDiT or VAE whose diffusers tensor names are given."""
    if component == "mmdit":
        return mmdit_modules(count_numbered(names, "transformer_blocks."))
    levels, blocks = (count_numbered(names, f"encoder.down_blocks.{inner}") for inner in ("", "0.resnets."))
    return vae_modules(levels, blocks)


def diffusers_names(native_key: str, modules: ModuleMap) -> DiffusersModules | None:
    """Returns the diffusers tensors that make up a native tensor, None for a key that is not in the map."""
    module, suffix = split_key(native_key)
    found = modules.get(module)
    return found and DiffusersModules(tuple(name + suffix for name in found.names), found.halves_swapped)


def native_names(names: Collection[str], modules: ModuleMap) -> dict[str, DiffusersModules]:
    """Returns, for diffusers tensor names, the native keys and what each is made of.

    A name that the map does not know is left out, so that the caller can compare and complain.
    """
    owner = {theirs: native for native, found in modules.items() for theirs in found.names}
    result: dict[str, DiffusersModules] = {}
    for name in names:
        module, suffix = split_key(name)
        if module in owner:
            key = owner[module] + suffix
            made_of = diffusers_names(key, modules)
            assert made_of is not None
            result[key] = made_of
    return result


def split_key(key: str) -> tuple[str, str]:
    """Returns module path and suffix: 'a.b.weight' -> ('a.b', '.weight'); a bare buffer has no suffix."""
    module, dot, last = key.rpartition(".")
    return (module, dot + last) if last in ("weight", "bias") else (key, "")


def _prefixed(table: Mapping[str, str], native: str, theirs: str) -> dict[str, str]:
    return {f"{native}.{ours}": f"{theirs}.{other}" for ours, other in table.items()}
