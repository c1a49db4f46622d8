"""A tiny CLIP with random weights as transformers writes one: for tests of what happens around a judge model."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sd3pipe.demo.base_files import TOKENIZERS

SIDE_PX, LENGTH = 32, 12


def write_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """Writes the model with its preprocessor and the demo's small vocabulary, and returns its folder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "clip_l")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {
        "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1,
    }  # fmt: skip
    config = CLIPConfig(
        projection_dim=16, text_config={**size, **words}, vision_config={**size, "image_size": SIDE_PX, "patch_size": 8}
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=SIDE_PX).save_pretrained(folder)
    return folder
