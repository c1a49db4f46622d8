"""`sd3pipe sample`: labelled grids of pictures, one per prompt, with the base in the first column."""

import logging
from dataclasses import replace
from pathlib import Path

from sd3pipe.cache.folder import weight_stamps
from sd3pipe.console import StageReport, count
from sd3pipe.device import choose_device
from sd3pipe.diffusion.drawing import Cell, decode_cells, draw_cells, lay_out, make_cell, sheet_of
from sd3pipe.diffusion.picture_store import PictureStore, made_from
from sd3pipe.diffusion.precision import BASE_DTYPES, resolve_precision
from sd3pipe.diffusion.prompts import read_prompts
from sd3pipe.diffusion.sampler import DEFAULTS, SamplingSettings, SkipLayerGuidance
from sd3pipe.diffusion.sheet import Places, Sheet, choose_columns, read_sheet
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import make_folder
from sd3pipe.models.architecture import MMDiTArchitecture, mmdit_architecture
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.params.sample import SampleParams

log = logging.getLogger(__name__)

_VAE_DIGITS = 8


def main(params: SampleParams) -> None:
    """Draws what is missing, decodes what can be decoded, and lays the grids out."""
    inputs = params.as_inputs("model", "prompts", "adapter")
    with StageReport("sample", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        stamps = weight_stamps(params.out)
        vae = _find_vae(params)
        places = Places(out=params.out, vae_mark=vae.fingerprint(stamps)[:_VAE_DIGITS] if vae else "")
        if params.decode:
            sheet, drawn, skipped = read_sheet(params.out), 0, 0
        else:
            sheet, drawn, skipped = _draw(params, places, stamps, report)
        stamps.save()
        decoded = decode_cells(sheet, places, vae, lambda: choose_device(params.device, params.threads)) if vae else 0
        grids = lay_out(sheet, places) if vae else 0
        report.update(drawn=drawn, skipped=skipped, decoded=decoded, grids=grids)
        laid_out = f"{count(grids, 'grid')} in {params.out}"
        if params.decode:
            report.summary = f"{count(decoded, 'picture')} decoded, {laid_out}"
        else:
            kept = "" if grids else f"; latents kept in {places.latents('').parent}"
            report.summary = f"{drawn} drawn, {skipped} there, {laid_out}{kept}"


def _find_vae(params: SampleParams) -> ComponentSource | None:
    """Returns the VAE, or None where a model comes without one. Raises InputError for one that was asked for."""
    if params.vae is not None or params.decode:
        return find_component("vae", model=params.model, file=params.vae)
    try:
        return find_component("vae", model=params.model)
    except InputError as error:
        log.warning("no VAE at hand, latents are kept: `sd3pipe sample --decode` finishes elsewhere (%s)", error)
        return None


def _draw(params: SampleParams, places: Places, stamps: FileStamps, report: StageReport) -> tuple[Sheet, int, int]:
    """Draws the cells that are not there yet as latents; returns the layout, how many were drawn, how many skipped."""
    assert params.prompts is not None
    source = find_component("mmdit", model=params.model, file=params.mmdit)
    architecture, base = mmdit_architecture(source), source.fingerprint(stamps)
    settings = _settings(params, architecture)
    columns = choose_columns(params.adapter, params.checkpoints, params.multipliers())
    prompts = read_prompts(params.prompts)
    device = choose_device(params.device, params.threads)
    precision = resolve_precision(params.mixed_precision, device)
    rows = [
        [
            [
                make_cell(prompt, column, seed, made_from(prompt, own, architecture, base, precision))
                for column in columns
            ]
            for seed in params.seed_numbers() or (prompt.own_seed,)
        ]
        for prompt in prompts
        for own in (prompt.settings(settings),)
    ]
    make_folder(params.out)
    sheet = sheet_of(prompts, columns, rows)
    sheet.save(params.out)
    store = PictureStore.beside(params.prompts)
    cells = [cell for lines in rows for line in lines for cell in line]
    missing = [
        cell for cell in cells if not places.is_done(cell.name) and not store.fetch(cell.key, places.latents(cell.name))
    ]

    def drawn(cell: Cell) -> None:
        store.keep(cell.key, places.latents(cell.name))
        report.begin()

    if missing:
        draw_cells(
            source,
            missing,
            lambda cell: places.latents(cell.name),
            settings=settings,
            device=device,
            dtype=BASE_DTYPES[precision],
            blocks_to_swap=params.blocks_to_swap,
            drawn=drawn,
        )
    return sheet, len(missing), len(cells) - len(missing)


def _settings(params: SampleParams, architecture: MMDiTArchitecture) -> SamplingSettings:
    """Returns how the variant is drawn, with skip-layer guidance where asked for."""
    settings = DEFAULTS[params.variant or architecture.variant]
    if not params.skip_layer_guidance:
        return settings
    skip = SkipLayerGuidance(scale=params.skip_layer_guidance, blocks=params.skipped_blocks())
    return replace(settings, skip_layers=skip)
