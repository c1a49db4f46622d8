"""The part of encode-text that needs torch and transformers: texts through tokenizers and encoders to rows."""

# B batch, D width

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sd3pipe.cache.rows import Row
from sd3pipe.cache.tensors import row_from_torch
from sd3pipe.device import choose_device
from sd3pipe.device_memory import memory_errors
from sd3pipe.encoding.t5_memory import streams_t5, t5_packer
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.text_encoder_files import TextEncoders
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.text_rows import EncodingMachine, compute_dtype, encode_rows, row_batches
from sd3pipe.models.tokenizers import TokenizedTexts, tokenize_for_encoders
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.words import EncoderName

Tokens = Mapping[EncoderName, TokenizedTexts]

_TIMED_SECONDS = 0.3  # how long a matrix product is timed for a forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class CutText:
    """A text of which an encoder reads only the beginning."""

    number: int
    tokens: Mapping[EncoderName, int]  # how many it has, for the encoders that cut it


def tokenized(texts: Sequence[str], encoders: TextEncoders, recipe: TextRecipe) -> tuple[Tokens, list[CutText]]:
    """Returns the texts' token ids, and which texts are cut. Raises InputError for foreign tokenizers."""
    tokens = tokenize_for_encoders(
        texts, encoders.tokenizers, encoders.sizes.vocabularies, clip_length=encoders.sizes.clip_length, recipe=recipe
    )
    cut = []
    for number in range(len(texts)):
        lost: dict[EncoderName, int] = {
            name: tokens[name].counts[number] for name in ENCODERS if tokens[name].is_cut(number)
        }
        if lost:
            cut.append(CutText(number=number, tokens=lost))
    return tokens, cut


def encoded_texts(
    tokens: Tokens, encoders: TextEncoders, recipe: TextRecipe, params: EncodeTextParams, scratch: Path
) -> Iterator[Row]:
    """Yields the row of each text. Raises InputError, and DeviceMemoryError with the way out."""
    device = choose_device(params.device, params.threads)
    t5_dtype = compute_dtype("t5xxl", recipe.text_dtype, device)
    machine = EncodingMachine(
        device=device,
        batch_rows=params.text_encoder_batch_size,
        stream_t5=streams_t5(
            params.t5xxl_streaming, encoders.sources["t5xxl"], t5_dtype, device, recipe.t5xxl_base_dtype
        ),
        scratch=scratch,
    )
    packer = t5_packer(recipe.t5xxl_base_dtype)
    rows = encode_rows(tokens, sources=encoders.sources, recipe=recipe, machine=machine, pack_t5=packer)
    with memory_errors(lambda: _way_out(machine)):
        for row in rows:
            yield row_from_torch(row, packed=("t5xxl",) if recipe.t5xxl_row_dtype else ())


def seconds_to_encode(
    tokens: Tokens, encoders: TextEncoders, recipe: TextRecipe, params: EncodeTextParams
) -> tuple[str, float]:
    """Returns the device and about how long it takes for these texts, by the speed of matrix products."""
    device = choose_device(params.device, params.threads)
    seconds = 0.0
    for name in ENCODERS:
        dtype = compute_dtype(name, recipe.text_dtype, device)
        shapes = encoders.sources[name].shapes()
        weights = sum(
            math.prod(shape)
            for key, shape in shapes.items()
            if len(shape) == 2 and not key.startswith("shared") and "embed" not in key
        )
        width = encoders.sizes.widths[name]
        layer = nn.Sequential(nn.Linear(width, 4 * width, bias=False, device=device, dtype=dtype))  # as the widest ones
        if name == "t5xxl" and (pack := t5_packer(recipe.t5xxl_base_dtype)) is not None:
            pack(layer)
        batches: dict[int, list[int]] = defaultdict(list)  # by their number of rows: the tokens of each
        for numbers in row_batches(tokens[name], params.text_encoder_batch_size):
            batches[len(numbers)].append(len(numbers) * tokens[name].lengths[numbers[0]])
        for sizes in batches.values():
            x_BD = torch.ones(round(statistics.mean(sizes)), width, dtype=dtype, device=device)
            seconds += sum(sizes) * weights / _products_per_second(x_BD, layer)
    return str(device), seconds


@torch.no_grad()
def _products_per_second(x_BD: torch.Tensor, layer: nn.Module) -> float:
    """Returns how many multiplications with a weight a layer makes per second, unpacking included."""
    done, start = 0, 0.0
    while done < 2 or time.perf_counter() - start < _TIMED_SECONDS:
        layer(x_BD)[0, 0].item()  # waits for the device
        start = time.perf_counter() if done == 0 else start  # the first product only warms up
        done += 1
    return (done - 1) * x_BD.numel() * 4 * x_BD.shape[1] / (time.perf_counter() - start)


def _way_out(machine: EncodingMachine) -> str:
    steps = [] if machine.stream_t5 else ["--t5xxl-streaming on"]
    if machine.batch_rows > 1:
        steps.append(f"--text-encoder-batch-size {max(1, machine.batch_rows // 4)}")
    if machine.device.type == "cuda":
        steps.append("--device cpu")
    return f"pass {' or '.join(steps)}" if steps else "free some of it for the text encoders"
