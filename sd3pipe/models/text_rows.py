"""Runs texts through the three encoders, one loaded at a time, and gives their rows in the order of the texts."""

# B batch, L tokens, D width, P pooled width

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from sd3pipe import stopping
from sd3pipe.console import progress
from sd3pipe.device import has_bfloat16
from sd3pipe.errors import InputError
from sd3pipe.files import storage_errors
from sd3pipe.models.layouts import TITLES
from sd3pipe.models.sources import ComponentSource
from sd3pipe.models.text_architecture import T5Architecture
from sd3pipe.models.text_encoders import ClipEncoder, T5Encoder
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.tokenizers import TokenizedTexts
from sd3pipe.tensors.formats import DTYPES
from sd3pipe.words import ClipName, EncoderName, Format

_WINDOW_BYTES = 256 << 20  # T5's hidden states that go through a block before the next one is read


Row = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingMachine:
    """How rows are computed, as far as that does not change what they are."""

    device: torch.device
    batch_rows: int
    stream_t5: bool
    scratch: Path  # a folder on a disk, for CLIP's outputs until T5's are there


def encode_rows(
    tokens: Mapping[EncoderName, TokenizedTexts],
    *,
    sources: Mapping[EncoderName, ComponentSource],
    recipe: TextRecipe,
    machine: EncodingMachine,
    pack_t5: Callable[[nn.Module], None] | None = None,
) -> Iterator[Row]:
    """Yields each text's row on the CPU: clip_l, clip_g, t5xxl [L, D]; pooled_l, pooled_g; mask_l, mask_g, mask_t5.

    `pack_t5` packs a block of T5 as the recipe's t5xxl_base_dtype says. Raises InputError for tensors that are no such
    encoder, and for states that are not finite.
    """
    if not len(tokens["t5xxl"].ids):
        return
    with _StoredRows(machine.scratch) as clip_l, _StoredRows(machine.scratch) as clip_g:
        clips: tuple[tuple[ClipName, _StoredRows], ...] = (("clip_l", clip_l), ("clip_g", clip_g))
        for name, stored in clips:
            for row in _clip_rows(name, tokens[name], sources[name], recipe, machine):
                stored.append(row)
        for number, t5 in enumerate(_t5_rows(tokens["t5xxl"], sources["t5xxl"], recipe, machine, pack_t5)):
            yield clip_l.read(number) | clip_g.read(number) | t5


def row_batches(tokens: TokenizedTexts, size: int) -> list[list[int]]:
    """Returns which texts pass an encoder together, in the order in which the first of each batch is due.

    Texts that are padded or cut fill batches of `size`, however far apart they are; the last one repeats its last text.
    One of a length between runs alone, as to fill up a batch of each such length would take several times the rows.
    Either way the batch's shape, and with it a row's bits, depend on the text's own length and not on its neighbours.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(tokens.lengths):
        groups[length].append(number)
    batches = []
    for length, numbers in groups.items():
        rows = size if length in tokens.common_lengths else 1
        batches += [numbers[start : start + rows] for start in range(0, len(numbers), rows)]
        batches[-1] += [numbers[-1]] * (rows - len(batches[-1]))
    return sorted(batches)


def _clip_rows(
    name: ClipName,
    tokens: TokenizedTexts,
    source: ComponentSource,
    recipe: TextRecipe,
    machine: EncodingMachine,
) -> Iterator[Row]:
    dtype, stored_as = compute_dtype(name, recipe.text_dtype, machine.device), DTYPES[recipe.text_dtype]
    encoder = ClipEncoder(source, dtype=dtype, device=machine.device)
    letter = name.removeprefix("clip_")
    with progress(f"encode-text {TITLES[name]}", len(tokens.ids), "captions") as counter:
        for numbers in row_batches(tokens, machine.batch_rows):
            stopping.check()
            batch = tokens.batch(numbers)
            hidden_BLD, pooled_BP = encoder.encode(batch, masked=recipe.apply_lg_attn_mask)
            masks_BL = torch.from_numpy(batch.mask)
            stored = (states.to("cpu", stored_as) for states in (hidden_BLD, pooled_BP))
            for hidden_LD, pooled, mask, _ in zip(*stored, masks_BL, set(numbers), strict=False):
                hidden_LD = _with_padding(hidden_LD, mask, recipe, source)
                yield {name: hidden_LD, f"pooled_{letter}": _finite(pooled, recipe, source), f"mask_{letter}": mask}
            counter.advance(len(set(numbers)))


def _t5_rows(
    tokens: TokenizedTexts,
    source: ComponentSource,
    recipe: TextRecipe,
    machine: EncodingMachine,
    pack: Callable[[nn.Module], None] | None,
) -> Iterator[Row]:
    dtype = compute_dtype("t5xxl", recipe.text_dtype, machine.device)
    encoder = T5Encoder(source, dtype=dtype, device=machine.device, streamed=machine.stream_t5, pack=pack)
    batches = row_batches(tokens, machine.batch_rows)
    passes = sum(map(len, batches)) * encoder.architecture.depth
    with progress(f"encode-text {TITLES['t5xxl']}", passes, "caption layers") as counter:

        def advance(number: int = 1) -> None:
            stopping.check()
            counter.advance(number)

        rows: dict[int, Row] = {}
        due = 0
        most_bytes = _WINDOW_BYTES if machine.stream_t5 else 0
        for window in _windows(batches, tokens.lengths, encoder.architecture, dtype, most_bytes):
            padded = [tokens.batch(numbers) for numbers in window]
            states = encoder.encode(padded, masked=recipe.apply_t5_attn_mask, advance=advance)
            for numbers, batch, hidden_BLD in zip(window, padded, states, strict=True):
                masks_BL = torch.from_numpy(batch.mask)
                stored_BLD = hidden_BLD.to("cpu", DTYPES[recipe.text_dtype])
                for number, hidden_LD, mask in zip(dict.fromkeys(numbers), stored_BLD, masks_BL, strict=False):
                    rows[number] = {"t5xxl": _with_padding(hidden_LD, mask, recipe, source), "mask_t5": mask}
            del states
            while due in rows:  # the rest, part of a batch of each common length, waits for rows of other lengths
                yield rows.pop(due)
                due += 1


def compute_dtype(name: EncoderName, text_dtype: Format, device: torch.device) -> torch.dtype:
    """Returns the number format that an encoder computes in.

    T5's activations leave float16's range, so it takes float32 for float16. Cards without bfloat16 (T4, 20xx) would
    emulate it, so they compute in float32; either way the rows are rounded to `text_dtype` in the end.
    """
    overflows = name == "t5xxl" and text_dtype == "float16"
    emulated = text_dtype == "bfloat16" and device.type == "cuda" and not has_bfloat16()
    return torch.float32 if overflows or emulated else DTYPES[text_dtype]


def _windows(
    batches: Sequence[list[int]], lengths: Sequence[int], t5: T5Architecture, dtype: torch.dtype, most_bytes: int
) -> Iterator[list[list[int]]]:
    """Yields the batches that pass a block of T5 before the next block's turn comes, by their states and biases.

    Few, so that rows are finished soon; many where each block has to be read anew.
    """
    window: list[list[int]] = []
    window_bytes, biased = 0, set[int]()
    for numbers in batches:
        length = lengths[numbers[0]]
        bias = 0 if length in biased else t5.heads * length**2
        window_bytes += (len(numbers) * length * t5.width + bias) * dtype.itemsize
        window.append(numbers)
        biased.add(length)
        if window_bytes >= most_bytes:
            yield window
            window, window_bytes, biased = [], 0, set()
    if window:
        yield window


def _with_padding(hidden_LD: Tensor, mask_L: Tensor, recipe: TextRecipe, source: ComponentSource) -> Tensor:
    """Returns the states with those at padding positions kept or zeroed, as the recipe says."""
    hidden_LD = _finite(hidden_LD, recipe, source)
    return hidden_LD.clone() if recipe.padding == "keep" else hidden_LD * mask_L[:, None]


def _finite(states: Tensor, recipe: TextRecipe, source: ComponentSource) -> Tensor:
    if not bool(torch.isfinite(states).all()):
        raise InputError(
            f"{source.where}: {TITLES[source.component]} puts out values that are not finite with --text-dtype "
            f"{recipe.text_dtype}: check the file with --verify-weights, or choose another --text-dtype"
        )
    return states


class _StoredRows:
    """Rows of one shape in a temporary file: 0.3 MB a text, too much for the memory when there are many texts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._like: Row = {}
        self._row_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        """Writes a row behind the others."""
        if not self._like:
            self._like = {name: torch.empty_like(tensor, device="meta") for name, tensor in row.items()}
            self._row_bytes = sum(tensor.nbytes for tensor in row.values())
        with storage_errors(self._folder):
            for tensor in row.values():
                self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def read(self, number: int) -> Row:
        """Returns the row that was written as the `number`-th."""
        with storage_errors(self._folder):
            self._file.seek(number * self._row_bytes)
            data = bytearray(self._file.read(self._row_bytes))
        row, start = {}, 0
        for name, like in self._like.items():
            row[name] = torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)
            start += like.nbytes
        return row
