"""Which parts of Stable Diffusion 3 a set of tensor names holds, and which foreign thing it is instead. Free of torch.

Keys and prefixes: model-spec sections 1.2 to 1.6, that is Stability AI's single files, ComfyUI's separate files and
diffusers' folders.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

Component = Literal["mmdit", "vae", "clip_l", "clip_g", "t5xxl"]
Naming = Literal["native", "diffusers"]

COMPONENTS: tuple[Component, ...] = ("mmdit", "vae", "clip_l", "clip_g", "t5xxl")
TITLES: dict[Component, str] = {
    "mmdit": "MMDiT",
    "vae": "VAE",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5xxl": "T5-XXL",
}
OPTIONS: dict[Component, str] = {
    "mmdit": "--model",
    "vae": "--vae",
    "clip_l": "--clip-l",
    "clip_g": "--clip-g",
    "t5xxl": "--t5xxl",
}

_PREFIXES: dict[Component, tuple[str, ...]] = {
    "mmdit": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("text_encoders.clip_l.transformer.",),
    "clip_g": ("text_encoders.clip_g.transformer.",),
    "t5xxl": ("text_encoders.t5xxl.transformer.",),
}
_CLIP_SIGNS: dict[str, Naming] = {
    "text_model.encoder.layers.0.layer_norm1.weight": "native",
    "encoder.layers.0.layer_norm1.weight": "diffusers",  # transformers 5 drops text_model. from a bare CLIPTextModel
}
_SIGNS: dict[Component, dict[str, Naming]] = {  # one key of the first block tells the component and its naming
    "mmdit": {
        "joint_blocks.0.x_block.attn.qkv.weight": "native",
        "transformer_blocks.0.attn.add_q_proj.weight": "diffusers",
    },
    "vae": {
        "encoder.down.0.block.0.conv1.weight": "native",
        "encoder.down_blocks.0.resnets.0.conv1.weight": "diffusers",
    },
    "clip_l": _CLIP_SIGNS,
    "clip_g": _CLIP_SIGNS,
    "t5xxl": {"encoder.block.0.layer.0.SelfAttention.q.weight": "native"},
}
_LORA = re.compile(r"lora_(up|down|[AB])\b|\.lora\.|\.(hada|lokr)_w|\.oft_|\.(alpha|dora_scale)$|^lycoris_")
_VISION = ("vision_model.", "visual_projection.")  # the other half of a whole CLIP
_STRAYS = re.compile(r"(^|\.)(embeddings\.position_ids|logit_scale)$")


@dataclass(frozen=True, slots=True)
class Part:
    """One component inside a set of names: its names without `prefix` follow `naming`."""

    component: Component
    prefix: str
    naming: Naming


def find_part(names: Collection[str], component: Component) -> Part | None:
    """Returns where a component is among tensor names, None if it is not there.

    A bare CLIP is found as whichever CLIP is asked for, because its names do not tell L from G.
    """
    for prefix in (*_PREFIXES[component], ""):
        for sign, naming in _SIGNS[component].items():
            if prefix + sign in names:
                return Part(component, prefix, naming)
    return None


def components_in(names: Collection[str]) -> list[str]:
    """Returns the titles of the components among tensor names, for messages."""
    if any(sign in names for sign in _CLIP_SIGNS):
        return ["a CLIP text encoder"]
    return [TITLES[component] for component in COMPONENTS if find_part(names, component)]


def names_of_part(names: Iterable[str], part: Part) -> dict[str, str]:
    """Returns the part's names without prefix, each with its full name."""
    others = () if part.prefix else tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    return {
        name.removeprefix(part.prefix): name
        for name in names
        if name.startswith(part.prefix) and not name.startswith(others)
    }


def canonical_text_names(names: Collection[str], component: Component) -> dict[str, str]:
    """Returns the transformers names of a text encoder's tensors, each with the name it was found under.

    Leaves out what SD3 does not use: buffers, T5's decoder, the second copy of T5's embedding, the vision tower of a
    whole CLIP, and CLIP-L's text projection: that of OpenAI's CLIP leads to where texts and pictures meet, SD3 was
    trained without it, and ComfyUI does without it. Where diffusers needs one, it is the identity.
    """
    kept = [name for name in names if not _STRAYS.search(name) and not name.startswith(_VISION)]
    if component == "clip_l":
        kept = [name for name in kept if not name.startswith("text_projection.")]
    if component == "t5xxl":
        result = {name: name for name in kept if not name.startswith(("decoder.", "lm_head."))}
        embedding = result.pop("encoder.embed_tokens.weight", None)
        if embedding is not None:
            result.setdefault("shared.weight", embedding)
        return result
    bare = not any(name.startswith("text_model.") for name in kept)
    outside = ("text_projection.", "scaled_fp8")
    return {f"text_model.{name}" if bare and not name.startswith(outside) else name: name for name in kept}


def foreign_kind(names: Collection[str]) -> str | None:
    """Returns what a file is if it is clearly no part of Stable Diffusion 3, with the way out; else None."""
    for is_kind, answer in _FOREIGN:
        if any(is_kind(name) for name in names):
            return answer
    return None


def _after_prefix(*starts: str) -> re.Pattern[str]:
    return re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.)?(" + "|".join(starts) + r")\.")


_FOREIGN = (
    (_LORA.search, "is a LoRA adapter, not a model: pass the base model as --model"),
    (_after_prefix("double_blocks", "single_blocks", "single_transformer_blocks").match, "is a Flux checkpoint"),
    (re.compile(r"^conditioner\.embedders\.").match, "is an SDXL checkpoint"),
    (re.compile(r"^cond_stage_model\.").match, "is a checkpoint of Stable Diffusion 1 or 2"),
    (_after_prefix("input_blocks", "down_blocks").match, "is a UNet of SDXL or SD 1/2"),
    (
        re.compile(r"^(\w+\.)?transformer\.resblocks\.").match,
        "is a CLIP in OpenCLIP's layout: pass the file with transformers' names (text_model.encoder.layers...)",
    ),
    (re.compile(r"^controlnet_blocks\.|^control_model\.").match, "is a ControlNet, not a model"),
    (
        re.compile(r"\.(absmax|quant_map|quant_state\.\S+|qweight|qzeros|SCB)$").search,
        "is quantised for another program (bitsandbytes or GPTQ): pass the bf16, fp16 or fp8 file",
    ),
)
