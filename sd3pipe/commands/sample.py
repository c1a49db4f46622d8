"""`sd3pipe sample`: labelled grids of pictures, one per prompt, with the base in the first column."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3pipe import stopping
from sd3pipe.cache.folder import machine_folder
from sd3pipe.console import Progress, StageReport, count, progress
from sd3pipe.errors import InputError
from sd3pipe.files import make_folder
from sd3pipe.memory.sizes import image_tokens
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.params.sample import SampleParams
from sd3pipe.stat_memory import StatMemory
from sd3pipe.training.sample_sheet import Column, PromptCells, Sheet, cell_name, choose_columns, read_sheet

if TYPE_CHECKING:
    import torch

    from sd3pipe.models.mmdit import MMDiT
    from sd3pipe.models.vae import VAE
    from sd3pipe.training.sample_prompts import SamplePrompt
    from sd3pipe.training.sampling import SamplingSettings

log = logging.getLogger(__name__)

_PICTURES, _LATENTS = "pictures", "latents"
_VAE_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One picture to draw."""

    name: str
    column: Column
    prompt: "SamplePrompt"
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where pictures and latents of the cells lie; a picture's name says which VAE decoded it."""

    out: Path
    vae_mark: str = ""

    def picture(self, name: str) -> Path:
        return self.out / _PICTURES / f"{name}-vae{self.vae_mark}.png"

    def latents(self, name: str) -> Path:
        return self.out / _LATENTS / f"{name}.safetensors"

    def is_done(self, name: str) -> bool:
        return self.latents(name).is_file() or (bool(self.vae_mark) and self.picture(name).is_file())


def main(params: SampleParams) -> None:
    """Draws what is missing, decodes what can be decoded, and lays the grids out."""
    inputs = {
        name: str(value) if (value := getattr(params, name)) else None for name in ("model", "prompts", "adapter")
    }
    with StageReport("sample", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        memory = StatMemory(machine_folder(params.out) / "weights.json")
        vae = _find_vae(params)
        places = _Places(out=params.out, vae_mark=vae.fingerprint(memory)[:_VAE_DIGITS] if vae else "")
        if params.decode:
            sheet, drawn, skipped = read_sheet(params.out), 0, 0
        else:
            sheet, drawn, skipped = _draw(params, places, memory, report)
        memory.save()
        decoded = _decode(params, sheet, places, vae) if vae else 0
        grids = _lay_out(sheet, places) if vae else 0
        report.update(drawn=drawn, skipped=skipped, decoded=decoded, grids=grids)
        report.summary = _summary(params, drawn, skipped, decoded, grids)


def _find_vae(params: SampleParams) -> ComponentSource | None:
    """Returns the VAE, or None where a model comes without one. Raises InputError for one that was asked for."""
    if params.vae is not None or params.decode:
        return find_component("vae", model=params.model, file=params.vae)
    try:
        return find_component("vae", model=params.model)
    except InputError as error:
        log.warning("no VAE at hand, latents are kept: `sd3pipe sample --decode` finishes elsewhere (%s)", error)
        return None


def _draw(params: SampleParams, places: _Places, memory: StatMemory, report: StageReport) -> tuple[Sheet, int, int]:
    """Draws the cells that are not there yet as latents; returns the layout, how many were drawn, how many skipped."""
    from sd3pipe.training.sample_prompts import read_prompts  # imports torch

    assert params.prompts is not None
    source = find_component("mmdit", model=params.model, file=params.mmdit)
    columns = choose_columns(params.adapter, params.checkpoints, params.multipliers())
    prompts = read_prompts(params.prompts)
    rows = [_row_of_cells(params, prompt, columns, source, memory) for prompt in prompts]
    sheet = Sheet(
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
    make_folder(params.out)
    sheet.save(params.out)
    cells = [cell for lines in rows for line in lines for cell in line]
    missing = [cell for cell in cells if not places.is_done(cell.name)]
    if missing:
        _draw_cells(params, source, missing, places, report)
    return sheet, len(missing), len(cells) - len(missing)


def _row_of_cells(
    params: SampleParams, prompt: "SamplePrompt", columns: list[Column], source: ComponentSource, memory: StatMemory
) -> list[list[_Cell]]:
    """Returns a prompt's cells, a row per seed."""
    from sd3pipe.models.checkpoint import mmdit_architecture

    settings = prompt.settings(_settings(params, source))
    made_from: dict[str, Any] = {
        "format": 1,
        "mmdit": source.fingerprint(memory),
        "texts": [prompt.key, prompt.negative_key],
        "size": prompt.size(mmdit_architecture(source)),
        "steps": settings.steps,
        "scale": settings.scale,
        "skip_layers": [params.skip_layer_guidance, params.skip_layers] if settings.skip_layers else None,
        "precision": params.mixed_precision,
    }
    return [
        [
            _Cell(name=cell_name(prompt.name, column, seed, made_from), column=column, prompt=prompt, seed=seed)
            for column in columns
        ]
        for seed in params.seed_numbers() or (prompt.own_seed,)
    ]


def _settings(params: SampleParams, source: ComponentSource) -> "SamplingSettings":
    """Returns how the variant is drawn, with skip-layer guidance where asked for."""
    from sd3pipe.models.checkpoint import mmdit_architecture
    from sd3pipe.training.sampling import DEFAULTS, SkipLayerGuidance

    settings = DEFAULTS[params.variant or mmdit_architecture(source).variant]
    if not params.skip_layer_guidance:
        return settings
    skip = SkipLayerGuidance(scale=params.skip_layer_guidance, blocks=params.skipped_blocks())
    return replace(settings, skip_layers=skip)


def _draw_cells(
    params: SampleParams, source: ComponentSource, cells: list[_Cell], places: _Places, report: StageReport
) -> None:
    """Loads the base once and draws cell after cell, adapter by adapter."""
    from sd3pipe.device import choose_device
    from sd3pipe.device_memory import memory_errors
    from sd3pipe.models.checkpoint import mmdit_architecture
    from sd3pipe.training.base_model import load_base
    from sd3pipe.training.memory_plan import blocks_to_sample
    from sd3pipe.training.precision import BASE_DTYPES, resolve_precision

    device = choose_device(params.device, params.threads)
    dtype = BASE_DTYPES[resolve_precision(params.mixed_precision, device)]
    settings = _settings(params, source)
    steps = sum(cell.prompt.settings(settings).steps for cell in cells)
    by_adapter = sorted(cells, key=lambda cell: (str(cell.column.adapter or ""), cell.column.multiplier))
    architecture = mmdit_architecture(source)
    streamed = params.blocks_to_swap
    if streamed == "auto":
        tokens = max(image_tokens(*cell.prompt.size(architecture)) for cell in cells)
        streamed = blocks_to_sample(architecture, tokens=tokens, device=device, dtype=dtype)
    way_out = functools.partial(_way_out, streamed, architecture.depth)
    with memory_errors(way_out), progress("sample", steps, "steps") as bar:
        mmdit, streamer = load_base(source, dtype=dtype, device=device, blocks_to_swap=streamed)
        with streamer:
            for _, group in groupby(by_adapter, key=lambda cell: cell.column):
                column_cells = list(group)
                with _adapted(mmdit, column_cells[0].column, device):
                    for cell in column_cells:
                        _draw_cell(cell, mmdit, settings, places, device, dtype, bar)
                        report.begin()


def _way_out(streamed: int, depth: int) -> str:
    """Returns what to do after running out of memory."""
    more = min(depth, streamed + max(1, depth // 4))
    return f"pass --blocks-to-swap {more}" if streamed < depth else "draw smaller pictures"


@contextlib.contextmanager
def _adapted(mmdit: "MMDiT", column: Column, device: "torch.device") -> Iterator[None]:
    """Attaches a column's adapter for the length of a block."""
    if column.adapter is None:
        yield
        return
    from sd3pipe.adapters.files import read_adapter
    from sd3pipe.adapters.network import attach_deltas

    network = attach_deltas(mmdit, read_adapter(column.adapter).model_part, device=device).eval()
    network.set_multiplier(column.multiplier)
    try:
        yield
    finally:
        network.detach()


def _draw_cell(
    cell: _Cell,
    mmdit: "MMDiT",
    settings: "SamplingSettings",
    places: _Places,
    device: "torch.device",
    dtype: "torch.dtype",
    bar: Progress,
) -> None:
    from sd3pipe.training.kept_latents import keep_latents
    from sd3pipe.training.sampling import sample_latents

    latents = sample_latents(
        mmdit,
        *cell.prompt.on(device, dtype),
        noise_BChw=cell.prompt.noise(mmdit.architecture, cell.seed).to(device),
        settings=cell.prompt.settings(settings),
        on_step=bar.advance,
    )
    keep_latents(places.latents(cell.name), latents, prompt=cell.prompt.prompt)


def _decode(params: SampleParams, sheet: Sheet, places: _Places, source: ComponentSource) -> int:
    """Decodes the latents whose pictures are missing, and returns how many."""
    waiting = [
        (prompt, name)
        for prompt in sheet.prompts
        for line in prompt.cells
        for name in line
        if places.latents(name).is_file() and not places.picture(name).is_file()
    ]
    if not waiting:
        return 0
    from sd3pipe.device import choose_device
    from sd3pipe.device_memory import decode_way_out, memory_errors
    from sd3pipe.models.checkpoint import load_vae
    from sd3pipe.training.kept_latents import read_latents
    from sd3pipe.training.picture_grid import save_picture
    from sd3pipe.training.sampling import decode_pictures

    device = choose_device(params.device, params.threads)
    way_out = functools.partial(decode_way_out, device)
    with memory_errors(way_out), progress("sample: decode", len(waiting), "pictures") as bar:
        vae: VAE = load_vae(source, device=device)
        for prompt, name in waiting:
            stopping.check()
            picture = decode_pictures(vae, read_latents(places.latents(name)).to(device))[0].numpy()
            save_picture(places.picture(name), picture, title=prompt.title)
            bar.advance()
    return len(waiting)


def _lay_out(sheet: Sheet, places: _Places) -> int:
    """Writes the grid of every prompt that has a picture, and returns how many."""
    from sd3pipe.training.picture_grid import Grid, read_picture_file, save_grid

    grids = 0
    for prompt in sheet.prompts:
        files = [[places.picture(name) for name in line] for line in prompt.cells]
        pictures = [[read_picture_file(file) if file.is_file() else None for file in line] for line in files]
        if any(picture is not None for line in pictures for picture in line):
            grid = Grid(title=prompt.title, columns=sheet.columns, rows=prompt.rows, pictures=pictures)
            save_grid(places.out / f"{prompt.name}.png", grid)
            grids += 1
    return grids


def _summary(params: SampleParams, drawn: int, skipped: int, decoded: int, grids: int) -> str:
    if params.decode:
        return f"{count(decoded, 'picture')} decoded, {count(grids, 'grid')} in {params.out}"
    kept = "" if grids else f"; latents kept in {params.out / _LATENTS}"
    return f"{drawn} drawn, {skipped} there, {count(grids, 'grid')} in {params.out}{kept}"
