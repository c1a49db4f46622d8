"""Encodes texts with a tiny base, as encode-text does, for tests."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.text_rows import EncodingMachine, Row, encode_rows
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.models.tokenizers import tokenize_for_encoders
from support.tiny_base import TinyBase


class Steps:
    """Counts what a progress bar would show."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, number: int = 1) -> None:
        self.done += number


@contextlib.contextmanager
def silent(description: str, total: int, unit: str) -> Iterator[Steps]:
    """Stands for console.progress, and checks that what was announced is done in the end."""
    steps = Steps()
    yield steps
    assert steps.done == total, f"{description}: {steps.done} of {total} {unit}"


def encode(
    base: TinyBase,
    texts: Sequence[str],
    scratch: Path,
    recipe: TextRecipe | None = None,
    *,
    batch_rows: int = 3,
    stream_t5: bool = False,
    device: str = "cpu",
    pack_t5: Callable[[nn.Module], None] | None = None,
) -> list[Row]:
    """Returns the rows of texts."""
    recipe = recipe or TextRecipe(text_dtype="float32", t5xxl_max_token_length=32, t5_pad_to=32)
    architecture = base.architecture
    tokens = tokenize_for_encoders(
        texts,
        find_tokenizers(folder=base.tokenizers),
        {name: getattr(architecture, name).vocabulary for name in ENCODERS},
        clip_length=architecture.clip_l.positions,
        recipe=recipe,
    )
    machine = EncodingMachine(device=torch.device(device), batch_rows=batch_rows, stream_t5=stream_t5, scratch=scratch)
    sources = {name: find_component(name, model=base.model, file=getattr(base, name)) for name in ENCODERS}
    with mock.patch("sd3pipe.models.text_rows.progress", silent):
        return list(encode_rows(tokens, sources=sources, recipe=recipe, machine=machine, pack_t5=pack_t5))


def equal_bits(first: Row, second: Row) -> bool:
    """Returns whether two rows are the same to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
