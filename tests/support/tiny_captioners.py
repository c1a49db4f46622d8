"""Captioners of a few thousand weights in the real layouts, with random weights: words without meaning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sd3pipe.files import make_folder, write_text

WORDS = (
    "a", "small", "large", "red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "on", "white",
    "black", "background",
)  # fmt: skip
_SPECIAL = (
    "[PAD]", "[UNK]", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": 32, "patch_size": 8, "projection_dim": 16}


def blip(folder: Path, words: Sequence[str] = WORDS, *, hidden: int = 32, layers: int = 2) -> Path:
    """Writes a BLIP model, as transformers saves it."""
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *words]
    write_text(make_folder(folder) / "vocab.txt", "\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(
        str(folder / "vocab.txt"), bos_token="[DEC]", additional_special_tokens=["[ENC]"]
    )
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**_TEXT, **shape, **ids, "vocab_size": len(vocabulary), "encoder_hidden_size": hidden,
                     "max_position_embeddings": 64, "projection_dim": 16},
        vision_config={**_VISION, **shape},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    pictures = BlipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def qwen2_vl(folder: Path) -> Path:
    """Writes a Qwen2-VL model, whose own processor wants torchvision for videos."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = _tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": 2,
                     "eos_token_id": 3, "pad_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                       "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "chat_template.jinja", _CHAT.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>"))
    return folder


def llava(folder: Path) -> Path:
    """Writes a LLaVA model, JoyCaption's layout."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(
            **_TEXT, num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, pad_token_id=0
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_CHAT.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def git(folder: Path) -> Path:
    """Writes a GIT model, whose pictures are a beginning of the text."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    write_text(make_folder(folder) / "vocab.txt", "\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    config = transformers.GitConfig(
        vision_config={**_TEXT, "image_size": 32, "patch_size": 8}, vocab_size=len(vocabulary), **_TEXT,
        bos_token_id=2, eos_token_id=3, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GitForCausalLM(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    transformers.GitProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def tagger(folder: Path, *, batch: int | None = None) -> Path:
    """Writes a tagger in WD14's layout whose tags say which of red, green and blue a picture has most of.

    The network takes the mean of each channel, blue first, as the probability of its tag.
    """
    import onnx
    from onnx import TensorProto, helper

    shape = [batch or "batch", 16, 16, 3]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels"], ["levels"], axes=[1, 2], keepdims=0),
            helper.make_node("Div", ["levels", "white"], ["shares"]),
            helper.make_node("Concat", ["shares", "shares"], ["probabilities"], axis=1),
        ],
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [shape[0], 6])],
        [helper.make_tensor("white", TensorProto.FLOAT, [], [255.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(make_folder(folder) / "model.onnx"))
    rows = ["0,blue_sky,0,9", "1,green_field,0,9", "2,red_dress,0,9", "3,sea_spirit,4,9", "4,general,9,9", "5,hero,4,9"]
    write_text(folder / "selected_tags.csv", "\n".join(["tag_id,name,category,count", *rows, ""]))
    return folder


def _tokenizer() -> Any:
    """Returns a tokenizer of whole words."""
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, "user", "assistant", *WORDS]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(_SPECIAL[4:]),
    )  # fmt: skip


LAYOUTS = {"qwen2_vl": qwen2_vl, "llava": llava, "git": git}
