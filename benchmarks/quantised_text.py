"""What packing T5 does to the text rows: error of the last hidden states against bfloat16's, bytes, seconds.

    python benchmarks/quantised_text.py                      four random blocks of T5-XXL's width, a second of text
    python benchmarks/quantised_text.py --model MODEL        the T5 in a model, with its own tokenizer: the demo's

Errors are of the states at text positions, relative to those in float32, over all texts; "to bf16" is the distance from
the rows that the default makes. The random weights have the scale that keeps states in range through four blocks.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3pipe.encoding.t5_memory import t5_bytes, t5_packer
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.text_encoders import T5Encoder
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.models.tokenizers import TokenBatch, tokenize_for_encoders
from sd3pipe.words import PackedFormat

WIDTH, MLP_WIDTH, HEADS, BUCKETS, VOCABULARY = 4096, 10240, 64, 32, 512
TEXTS = [
    "a photo of a cat on a table",
    "red circle, blue square",
    "portrait of a woman, soft light, film grain",
    "tree",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="a model with T5 and its tokenizers beside it; default: random weights"
    )
    parser.add_argument("--t5xxl", type=Path, help="T5 in a file of its own")
    parser.add_argument("--tokenizers", type=Path)
    parser.add_argument("--blocks", type=int, default=4, help="of the random T5")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            source, batch = random_t5(Path(folder) / "t5.safetensors", arguments.blocks), random_batch(arguments.tokens)
        else:
            source = find_component("t5xxl", model=arguments.model, file=arguments.t5xxl)
            batch = real_batch(arguments.model, arguments.t5xxl, arguments.tokenizers, source, arguments.tokens)
        report(source, batch)


def report(source: ComponentSource, batch: TokenBatch) -> None:
    """Prints a line for each format."""
    exact, _, _ = states(source, batch, torch.float32, None)
    default, nbytes, seconds = states(source, batch, torch.bfloat16, None)
    print(f"{'format':<6} {'error':>8} {'to bf16':>8} {'weights':>9} {'seconds':>8}")
    print(f"{'bf16':<6} {distance(default, exact):8.2%} {0:8.2%} {nbytes / 1e6:6.0f} MB {seconds:8.2f}")
    for name in ("fp8", "int8", "nf4"):
        packed, nbytes, seconds = states(source, batch, torch.bfloat16, name)
        errors = f"{distance(packed, exact):8.2%} {distance(packed, default):8.2%}"
        print(f"{name:<6} {errors} {nbytes / 1e6:6.0f} MB {seconds:8.2f}")


def states(
    source: ComponentSource, batch: TokenBatch, dtype: torch.dtype, packed: PackedFormat | None
) -> tuple[Tensor, int, float]:
    """Returns the states at text positions, the bytes of all blocks, and the seconds of encoding."""
    encoder = T5Encoder(source, dtype=dtype, pack=t5_packer(packed))
    start = time.perf_counter()
    (states_BLD,) = encoder.encode([batch], masked=False)
    seconds = time.perf_counter() - start
    nbytes = t5_bytes(source, dtype, packed)
    return states_BLD[torch.from_numpy(batch.mask).bool()].float(), nbytes, seconds


def distance(states_ND: Tensor, others_ND: Tensor) -> float:
    """Returns the norm of the difference over the norm."""
    return float((states_ND - others_ND).norm() / others_ND.norm())


def random_t5(path: Path, blocks: int) -> ComponentSource:
    """Writes a T5 of the real width with a few blocks of random weights."""
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    tensors = {"shared.weight": matrix(VOCABULARY, WIDTH, 1.0)}
    for index in range(blocks):
        prefix = f"encoder.block.{index}.layer."
        for name in "qkvo":  # T5 does not divide scores by the root of the head width; its q is smaller instead
            scale = WIDTH**-0.5 * (64**-0.5 if name == "q" else 1.0)
            tensors[f"{prefix}0.SelfAttention.{name}.weight"] = matrix(WIDTH, WIDTH, scale)
        for name in ("wi_0", "wi_1"):
            tensors[f"{prefix}1.DenseReluDense.{name}.weight"] = matrix(MLP_WIDTH, WIDTH, WIDTH**-0.5)
        tensors[f"{prefix}1.DenseReluDense.wo.weight"] = matrix(WIDTH, MLP_WIDTH, MLP_WIDTH**-0.5)
        for number in (0, 1):
            tensors[f"{prefix}{number}.layer_norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = matrix(BUCKETS, HEADS, 1.0)
    tensors["encoder.final_layer_norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    save_file(tensors, path)
    return find_component("t5xxl", model=None, file=path)


def random_batch(tokens: int) -> TokenBatch:
    ids_BL = torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(2)).numpy()
    return TokenBatch(ids=ids_BL, mask=(ids_BL >= 0).astype("uint8"))


def real_batch(
    model: Path, t5xxl: Path | None, tokenizers: Path | None, source: ComponentSource, tokens: int
) -> TokenBatch:
    """Returns a few texts by the model's own tokenizer."""
    vocabularies = {
        name: find_component(name, model=model).shapes()["text_model.embeddings.token_embedding.weight"][0]
        for name in ("clip_l", "clip_g")
    } | {"t5xxl": source.shapes()["shared.weight"][0]}
    found = tokenize_for_encoders(
        TEXTS,
        find_tokenizers(folder=tokenizers, model=str(model), files=[t5xxl]),
        vocabularies,
        clip_length=77,
        recipe=TextRecipe(t5xxl_max_token_length=tokens, t5_pad_to=tokens),
    )
    return found["t5xxl"].batch(list(range(len(TEXTS))))


if __name__ == "__main__":
    main()
