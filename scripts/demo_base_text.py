"""The demo base's text encoders: random weights whose states still tell the words apart, and small tokenizers.

Attention and MLPs add only a little to each word's own random vector, so an MMDiT learns words nearly as from a table.
The last layer of each CLIP, which shapes the pooled vector alone, averages over all words and says it loudly.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3pipe.demo.base_files import T5_LENGTH
from sd3pipe.demo.drawings import NEW_WORD, WORDINGS, all_subjects
from sd3pipe.diffusion.sampler import TextCondition
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import ENCODERS, ClipArchitecture, T5Architecture
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.text_rows import EncodingMachine, encode_rows
from sd3pipe.models.tokenizers import load_tokenizer, tokenize_for_encoders
from sd3pipe.words import EncoderName

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.tiny_tokenizers import train_tokenizers

CLIP_WIDTH, T5_WIDTH = 64, 128  # two CLIPs side by side are as wide as T5
CLIP_POSITIONS = 10  # the grammar's longest caption has eight words; fewer tokens make training cheap
_SEED = 11
_DAMPING = 0.25
_POOLING_GAIN = 3.0

Architecture = ClipArchitecture | T5Architecture


def write_text_encoders(folder: Path) -> Path:
    """Writes tokenizers/ and text.safetensors, with the encoders under a checkpoint's keys, in half precision."""
    tokenizers = folder / "tokenizers"
    captions = [subject.caption(wording) for subject in all_subjects() for wording in range(len(WORDINGS))]
    # the new word is a token of its own, as rare words are in CLIP's vocabulary; the base never sees it in training
    captions += [f"a {NEW_WORD}"] * 200
    # sentencepiece makes a piece of what two different words share: with a comma and without, every word becomes one
    words = sorted({word.strip(",") for caption in captions for word in caption.split()})
    train_tokenizers(tokenizers, captions + [f"{word}, {word}" for word in words])
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {
        f"text_encoders.{name}.transformer.{key}": _random(name, key, shape, architecture.depth, generator).half()
        for name, architecture in _architectures(tokenizers).items()
        for key, shape in architecture.shapes().items()
    }
    file = folder / "text.safetensors"
    save_file(tensors, file)
    return file


def encode(captions: Sequence[str], folder: Path, *, t5_length: int = T5_LENGTH) -> TextCondition:
    """Returns the context [B, L, D] and pooled [B, P] of captions, by the encoders that lie in `folder`."""
    sources = {name: find_component(name, model=folder / "text.safetensors") for name in ENCODERS}
    recipe = TextRecipe(t5xxl_max_token_length=t5_length, t5_pad_to=t5_length, text_dtype="float32")
    tokens = tokenize_for_encoders(
        captions,
        {name: folder / "tokenizers" / name for name in ENCODERS},
        {name: architecture.vocabulary for name, architecture in _architectures(folder / "tokenizers").items()},
        clip_length=CLIP_POSITIONS,
        recipe=recipe,
    )
    machine = EncodingMachine(device=torch.device("cpu"), batch_rows=64, stream_t5=False, scratch=folder)
    rows = list(encode_rows(tokens, sources=sources, recipe=recipe, machine=machine))
    context_BLD, pooled_BP = assemble_conditioning(rows)
    return TextCondition(context=context_BLD, pooled=pooled_BP)


def _architectures(tokenizers: Path) -> dict[EncoderName, Architecture]:
    sizes = {name: load_tokenizer(name, tokenizers / name).size for name in ENCODERS}
    t5 = T5Architecture(
        width=T5_WIDTH,
        depth=2,
        heads=T5_WIDTH // 64,
        mlp_width=2 * T5_WIDTH,
        vocabulary=math.ceil((sizes["t5xxl"] + 100) / 128) * 128,  # 100 sentinels, rounded up as T5's own
        distance_buckets=32,
    )
    return {"clip_l": _clip(sizes["clip_l"], None), "clip_g": _clip(sizes["clip_g"], CLIP_WIDTH), "t5xxl": t5}


def _clip(vocabulary: int, projected_width: int | None) -> ClipArchitecture:
    return ClipArchitecture(
        width=CLIP_WIDTH,
        depth=2,
        mlp_width=4 * CLIP_WIDTH,
        vocabulary=vocabulary,
        positions=CLIP_POSITIONS,
        projected_width=projected_width,
    )


def _random(name: EncoderName, key: str, shape: tuple[int, ...], depth: int, generator: torch.Generator) -> Tensor:
    """Returns the random weight of a key; see the first lines of this file for the scales."""
    if len(shape) == 1:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    if "token_embedding" in key or "shared" in key:
        return values
    if "position_embedding" in key or "relative_attention_bias" in key:
        return 0.5 * values
    values *= shape[1] ** -0.5
    layer = key.split(".")[-2]
    pools = name != "t5xxl" and f"layers.{depth - 1}." in key
    if pools and layer in ("q_proj", "k_proj"):
        return 0.3 * values
    if pools and layer == "out_proj":
        return _POOLING_GAIN * values
    if "SelfAttention.q" in key:
        return values / 8  # T5 does not scale its attention scores by the root of 64; its weights do
    return _DAMPING * values if layer in ("out_proj", "fc2", "o", "wo") else values
