"""What a file that is no SD3 adapter seems to be, so that the refusal can say it. Free of torch."""

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_LORA = re.compile(
    r"lora_(down|up|A|B)|lora\.(down|up)|hada_w|lokr_w|\.alpha$|dora_scale|\.b?oft_|\.diff(_b)?$|\.[ab][12]\.weight$"
)
_UNET = re.compile(r"(down|up|mid|input|output|middle)_block")
_UNET_BY_TEXT_WIDTH = {768: "a LoRA for SD 1.5", 1024: "a LoRA for SD 2", 2048: "a LoRA for SDXL"}
# Under diffusers' names Flux's double blocks are called as SD3's are, whose attention is 1536 or 2432 wide. It is the
# attention that tells them apart: in a medium SD3 the last block's norm has 3072 rows, too.
_FLUX_WIDTH = 3072
_ATTENTION_OF_DIFFUSERS = re.compile(r"transformer_blocks[._]\d+[._]attn[._](to|add)_")
_KINDS_OF_LORA = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "a LoRA for Flux"),
    (r"blocks[._]\d+[._](cross_attn|self_attn|ffn)", "a LoRA for Wan"),
    (r"img_mlp|txt_mlp|img_mod|txt_mod", "a LoRA for Qwen-Image or HunyuanVideo"),
    (r"layers[._]\d+[._](attention|feed_forward)", "a LoRA for Lumina or Z-Image"),
    (r"caption_projection", "a LoRA for PixArt"),
    (r"joint_transformer_blocks", "a LoRA for AuraFlow"),
)
_KINDS_OF_CHECKPOINT = (
    (r"(^|\.)joint_blocks\.\d+\.x_block\.attn\.qkv\.weight$", "a whole SD3 checkpoint"),
    (r"^transformer_blocks\.\d+\.attn\.add_q_proj\.weight$", "a whole SD3 or Flux transformer in diffusers' layout"),
    (r"(^|\.)double_blocks\.\d+\.img_attn", "a whole Flux checkpoint"),
    (r"input_blocks\.\d+\.\d+\.transformer_blocks|^conditioner\.", "a whole SD or SDXL checkpoint"),
    (r"(^|\.)(down_blocks|up_blocks)\.\d+\.(attentions|resnets)", "a whole UNet or VAE in diffusers' layout"),
    (r"(encoder|decoder)\.(down|up)\.\d+\.block", "a VAE"),
    (r"(^|\.)text_model\.(encoder|embeddings)|encoder\.block\.\d+\.layer", "a text encoder"),
)
_EMBEDDING_KEYS = {"clip_l", "clip_g", "t5xxl", "t5", "emb_params", "string_to_param", "string_to_param.*"}


def describe(shapes: Shapes) -> str:
    """Returns what the tensors of a file look like, as the end of 'seems to be ...'."""
    names = sorted(shapes)
    if not names:
        return "an empty file"
    if shapes.keys() <= _EMBEDDING_KEYS:
        return "a textual-inversion embedding"
    what = "a LoRA for another model" if any(_LORA.search(name) for name in names) else "something else"
    return foreign_kind(shapes) or f"{what} (its first key is {ascii(names[0])[:120]})"


def foreign_kind(shapes: Shapes) -> str | None:
    """Returns what the tensors of a file certainly are, where that is no SD3 adapter; else None."""
    names = sorted(shapes)
    if not any(_LORA.search(name) for name in names):
        return _first(_KINDS_OF_CHECKPOINT, names)
    if any(_UNET.search(name) for name in names):
        return _kind_of_unet(shapes)
    if any(_FLUX_WIDTH in shape for name, shape in shapes.items() if _ATTENTION_OF_DIFFUSERS.search(name)):
        return "a LoRA for Flux"
    return _first(_KINDS_OF_LORA, names)


def _kind_of_unet(shapes: Shapes) -> str:
    """Tells the UNets apart by the width of the text that their cross-attention reads."""
    for name, shape in shapes.items():
        if re.search(r"attn2[._]to_k", name) and len(shape) == 2 and shape[1] in _UNET_BY_TEXT_WIDTH:
            return _UNET_BY_TEXT_WIDTH[shape[1]]
    sgm_names = any(re.search(r"(input|output|middle)_block", name) for name in shapes)
    return "a LoRA for SDXL" if sgm_names else "a LoRA for SD 1.5, SD 2 or SDXL"


def _first(kinds: tuple[tuple[str, str], ...], names: list[str]) -> str | None:
    return next((kind for pattern, kind in kinds if any(re.search(pattern, name) for name in names)), None)
