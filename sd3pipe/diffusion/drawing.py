"""Draws the cells of a sheet that are not there yet, decodes them, and lays the grids out. Imports torch and PIL.

What is drawn lies as latents in OUT/latents, and as pictures in OUT/pictures once a VAE has decoded it; who draws more
columns or seeds into the same folder finds what is there already.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue

from sd3pipe import stopping
from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.console import progress
from sd3pipe.device_memory import decode_way_out, memory_errors
from sd3pipe.diffusion.base_model import blocks_to_sample, load_base
from sd3pipe.diffusion.kept_latents import keep_latents, read_latents, read_parameters
from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, save_grid, save_picture
from sd3pipe.diffusion.picture_store import adapter_words, picture_key
from sd3pipe.diffusion.prompts import SamplePrompt
from sd3pipe.diffusion.sampler import SamplingSettings, decode_pictures
from sd3pipe.diffusion.sheet import Column, Places, PromptCells, Sheet, cell_name
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.sizes import image_tokens
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.sources import ComponentSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One picture to draw."""

    name: str
    key: str  # hash of all that it is made from
    column: Column
    prompt: SamplePrompt
    seed: int


def make_cell(prompt: SamplePrompt, column: Column, seed: int, made_from: Mapping[str, JsonValue]) -> Cell:
    """Returns the picture of a prompt in a column."""
    key = picture_key(adapter_hash=column.adapter_hash, multiplier=column.multiplier, seed=seed, made_from=made_from)
    return Cell(name=cell_name(prompt.name, column, seed, key), key=key, column=column, prompt=prompt, seed=seed)


def sheet_of(prompts: Sequence[SamplePrompt], columns: Sequence[Column], rows: Sequence[list[list[Cell]]]) -> Sheet:
    """Returns the layout of all prompts' cells, [prompt][seed][column]."""
    return Sheet(
        columns=tuple(column.label for column in columns),
        prompts=tuple(
            PromptCells(
                name=prompt.name,
                title=prompt.prompt,
                rows=tuple(f"seed {line[0].seed}" for line in lines),
                cells=tuple(tuple(cell.name for cell in line) for line in lines),
            )
            for prompt, lines in zip(prompts, rows, strict=True)
        ),
    )


def draw_cells(
    source: ComponentSource,
    cells: Sequence[Cell],
    file_of: Callable[[Cell], Path],
    *,
    settings: SamplingSettings,
    device: torch.device,
    dtype: torch.dtype,
    blocks_to_swap: int | Literal["auto"],
    drawn: Callable[[Cell], None],
    forecast: Callable[[float], None] | None = None,
) -> None:
    """Loads the base once and draws cell after cell, adapter by adapter, into files; `drawn` is called after each.

    `forecast` is told beforehand about how many seconds it will take, from one step that is timed.

    With `auto` as few blocks are streamed as fit. Raises DeviceMemoryError, Stopped.
    """
    architecture = mmdit_architecture(source)
    if blocks_to_swap == "auto":
        tokens = max(image_tokens(*cell.prompt.size(architecture)) for cell in cells)
        blocks_to_swap = blocks_to_sample(architecture, tokens=tokens, device=device, dtype=dtype)
    steps = sum(cell.prompt.settings(settings).steps for cell in cells)
    by_adapter = sorted(cells, key=lambda cell: (str(cell.column.adapter or ""), cell.column.multiplier))
    cure = functools.partial(way_out, blocks_to_swap, architecture.depth)
    with memory_errors(cure), progress("sample", steps, "steps") as bar:
        mmdit, streamer = load_base(
            source, dtype=dtype, device=device, settings=Settings(blocks_to_swap=blocks_to_swap)
        )
        with streamer:
            if forecast is not None:
                forecast(steps * _seconds_per_step(mmdit, cells[0].prompt, settings, device, dtype))
            for column, group in groupby(by_adapter, key=lambda cell: cell.column):
                with adapted(mmdit, column, device):
                    for cell in group:
                        latents = cell.prompt.drawn(mmdit, settings, device, dtype, seed=cell.seed, on_step=bar.advance)
                        keep_latents(
                            file_of(cell),
                            latents,
                            prompt=cell.prompt.prompt,
                            parameters=cell.prompt.parameters(
                                settings,
                                architecture,
                                seed=cell.seed,
                                more=adapter_words(column.adapter_hash, column.multiplier),
                            ),
                        )
                        drawn(cell)


def decode_cells(sheet: Sheet, places: Places, source: ComponentSource, choose: Callable[[], torch.device]) -> int:
    """Decodes the latents whose pictures are missing, on the device that `choose` returns, and returns how many.

    Raises DeviceMemoryError, Stopped.
    """
    waiting = [
        (prompt, name)
        for prompt in sheet.prompts
        for line in prompt.cells
        for name in line
        if places.latents(name).is_file() and not places.picture(name).is_file()
    ]
    if not waiting:
        return 0
    device = choose()
    way_out = functools.partial(decode_way_out, device)
    with memory_errors(way_out), progress("sample: decode", len(waiting), "pictures") as bar:
        vae = load_vae(source, device=device)
        for prompt, name in waiting:
            stopping.check()
            kept = read_latents(places.latents(name), vae.architecture.latent_channels)
            picture = decode_pictures(vae, kept.to(device))[0].numpy()
            parameters = read_parameters(places.latents(name))
            save_picture(places.picture(name), picture, title=prompt.title, parameters=parameters)
            bar.advance()
    return len(waiting)


def lay_out(sheet: Sheet, places: Places) -> int:
    """Writes the grid of every prompt that has a picture, and returns how many."""
    grids = 0
    for prompt in sheet.prompts:
        files = [[places.picture(name) for name in line] for line in prompt.cells]
        pictures = [[read_picture_file(file) if file.is_file() else None for file in line] for line in files]
        if any(picture is not None for line in pictures for picture in line):
            grid = Grid(title=prompt.title, columns=sheet.columns, rows=prompt.rows, pictures=pictures)
            save_grid(places.out / f"{prompt.name}.png", grid)
            grids += 1
    return grids


def _seconds_per_step(
    mmdit: MMDiT, prompt: SamplePrompt, settings: SamplingSettings, device: torch.device, dtype: torch.dtype
) -> float:
    """Returns the time of one step with the base alone; the first one, which warms up, does not count."""
    one_step = replace(prompt, steps=1)
    one_step.drawn(mmdit, settings, device, dtype).cpu()  # which waits for the device
    start = time.monotonic()
    one_step.drawn(mmdit, settings, device, dtype).cpu()
    return time.monotonic() - start


def way_out(streamed: int, depth: int) -> str:
    """Returns what to do after running out of memory."""
    more = min(depth, streamed + max(1, depth // 4))
    return f"pass --blocks-to-swap {more}" if streamed < depth else "draw smaller pictures"


@contextlib.contextmanager
def adapted(mmdit: MMDiT, column: Column, device: torch.device) -> Iterator[None]:
    """Attaches a column's adapter for the length of a block."""
    if column.adapter is None:
        yield
        return
    network = attach_deltas(mmdit, read_adapter(column.adapter).model_part, device=device).eval()
    network.set_multiplier(column.multiplier)
    try:
        yield
    finally:
        network.detach()
