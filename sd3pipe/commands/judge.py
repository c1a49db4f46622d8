"""`sd3pipe judge`: which checkpoint at which strength, measured on equal noise, with how sure that is."""

import logging
from pathlib import Path

import torch

from sd3pipe.adapters.find import checkpoint_adapters
from sd3pipe.cache.folder import weight_stamps
from sd3pipe.cache.reader import CacheReader
from sd3pipe.console import StageReport, count, readable_seconds, say
from sd3pipe.device import choose_device
from sd3pipe.diffusion.drawing import Cell, draw_cells, make_cell
from sd3pipe.diffusion.picture_store import made_from
from sd3pipe.diffusion.precision import BASE_DTYPES, resolve_precision
from sd3pipe.diffusion.prompts import SamplePrompt, read_prompts
from sd3pipe.diffusion.sampler import DEFAULTS, SamplingSettings
from sd3pipe.diffusion.sheet import Column, choose_columns
from sd3pipe.errors import ParameterError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import make_folder, write_text
from sd3pipe.judging.judge_model import find_judge_model, fingerprint, reads_text
from sd3pipe.judging.page import render
from sd3pipe.judging.pictures import JudgeStore, embed, open_judge_store, to_draw
from sd3pipe.judging.references import read_references
from sd3pipe.judging.suggestion import Candidate
from sd3pipe.judging.trigger import bears, find_trigger
from sd3pipe.judging.verdict import Comparison, judgement
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.params.judge import JudgeParams
from sd3pipe.words import Precision

log = logging.getLogger(__name__)


def main(params: JudgeParams) -> None:
    """Draws, looks and compares what is missing, and writes judge.json and a page."""
    inputs = params.as_inputs("model", "adapter", "prompts", "latents", "judge_model")
    with StageReport("judge", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        stamps = weight_stamps(params.out)
        mmdit = find_component("mmdit", model=params.model, file=params.mmdit)
        vae = find_component("vae", model=params.model, file=params.vae)
        judge_folder = find_judge_model(params.judge_model)
        latents, prompts = CacheReader(params.latents), read_prompts(params.prompts)
        seen = open_judge_store(
            params.prompts, params.out, vae=vae.fingerprint(stamps), judge=fingerprint(judge_folder, stamps)
        )
        device = choose_device(params.device, params.threads)
        precision = resolve_precision(params.mixed_precision, device)
        settings = DEFAULTS[params.variant or mmdit_architecture(mmdit).variant]
        checkpoints = params.checkpoints or ("all" if checkpoint_adapters(params.adapter) else None)
        columns = choose_columns(params.adapter, checkpoints, params.multipliers())  # the base and all at each strength
        name = params.adapter.resolve().stem  # of an adapter that has no step
        comparison = Comparison(
            cells=_cells(params, prompts, columns, settings, mmdit, mmdit.fingerprint(stamps), precision),
            candidates=[
                Candidate(checkpoint=name if column.step is None else column.step, multiplier=column.multiplier)
                for column in columns[1:]
            ],
            references=read_references(latents),
            trigger=_trigger(params, prompts, stamps),
            reads_text=reads_text(judge_folder),
            is_style=params.goal == "style" and not params.judge_sees_style,
            tolerance=params.tolerance,
            judge_model=params.judge_model,
        )
        stamps.save()
        make_folder(params.out)
        cells = [cell for column in comparison.cells for row in column for cell in row]
        drawn = _draw(params, comparison, seen, cells, mmdit, settings, device, precision, report)
        looked = embed(
            seen,
            cells,
            comparison.shown(),
            comparison.references,
            comparison.texts,
            latents=latents,
            vae_source=vae,
            judge_folder=judge_folder,
            device=device,
        )
        found = judgement(comparison, seen)
        file = found.save(params.out)
        write_text(params.out / "judge.html", render(found, params.out))
        report.begin()
        report.update(drawn=drawn, looked_at=looked, pictures=len(cells), suggestion=found.suggestion.text)
        report.summary = f"{drawn} drawn, {len(cells) - drawn} there, see {file.with_suffix('.html')}"
    say(found.suggestion.text)


def _cells(
    params: JudgeParams,
    prompts: list[SamplePrompt],
    columns: list[Column],
    defaults: SamplingSettings,
    source: ComponentSource,
    base: str,
    precision: Precision,
) -> list[list[list[Cell]]]:
    """Returns the pictures [column][prompt][seed]."""
    architecture = mmdit_architecture(source)
    made = [made_from(prompt, prompt.settings(defaults), architecture, base, precision) for prompt in prompts]
    return [
        [
            [make_cell(prompt, column, seed, of_prompt) for seed in params.seed_numbers()]
            for prompt, of_prompt in zip(prompts, made, strict=True)
        ]
        for column in columns
    ]


def _trigger(params: JudgeParams, prompts: list[SamplePrompt], stamps: FileStamps) -> str:
    """Returns the words that tell prompts which ask for what is learnt; "" where nothing says them."""
    texts = [prompt.prompt for prompt in prompts]
    if params.trigger != "auto":
        if not bears(texts, params.trigger).any():
            raise ParameterError(f"--trigger {params.trigger}: no prompt of {params.prompts} has it")
        return params.trigger
    if params.dataset is None or not params.dataset.is_file():
        log.warning("no dataset file is here to find the trigger in: say --trigger WORD, else drift is not measured")
        return ""
    found = find_trigger(params.dataset, texts, stamps)
    if found:
        log.info("judge: %d of %d prompts bear the trigger, %s", bears(texts, found).sum(), len(texts), found)
    else:
        log.warning("%s: no word of its captions tells prompts apart: say --trigger WORD", params.dataset)
    return found


def _draw(
    params: JudgeParams,
    comparison: Comparison,
    seen: JudgeStore,
    cells: list[Cell],
    source: ComponentSource,
    settings: SamplingSettings,
    device: torch.device,
    precision: Precision,
    report: StageReport,
) -> int:
    """Draws the pictures that are missing, and returns how many."""
    missing = to_draw(seen, cells, comparison.shown())
    if missing:
        to_come = f"{count(len(missing), 'picture')} to draw, {len(cells) - len(missing)} there"
        draw_cells(
            source,
            missing,
            lambda cell: seen.store.file(cell.key),
            settings=settings,
            device=device,
            dtype=BASE_DTYPES[precision],
            blocks_to_swap=params.blocks_to_swap,
            drawn=lambda cell: report.begin(),
            forecast=lambda seconds: log.info("judge: %s: about %s", to_come, readable_seconds(seconds)),
        )
    return len(missing)
