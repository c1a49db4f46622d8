"""`sd3pipe check-captions`: captions and pictures that do not belong together, from the caches alone."""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sd3pipe.cache.folder import machine_folder, weight_stamps
from sd3pipe.cache.reader import CacheReader
from sd3pipe.caption_findings import CaptionFindings
from sd3pipe.console import StageReport, count, listed, progress, readable_seconds
from sd3pipe.device import choose_device
from sd3pipe.device_memory import memory_errors
from sd3pipe.diffusion.base_model import blocks_to_sample, load_base
from sd3pipe.diffusion.drawing import adapted, way_out
from sd3pipe.diffusion.picture_store import shared_folder
from sd3pipe.diffusion.precision import BASE_DTYPES, resolve_precision
from sd3pipe.diffusion.sampler import PIXELS_PER_LATENT
from sd3pipe.diffusion.sheet import Column, choose_columns
from sd3pipe.files import make_folder, write_text
from sd3pipe.judging.caption_answers import CaptionCheck, read_pictures, with_training
from sd3pipe.judging.caption_page import render_findings
from sd3pipe.judging.rows import ResultRows
from sd3pipe.judging.velocity_errors import Answerer, Asked, Noise, Question
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.sizes import image_tokens
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.params.check_captions import CheckCaptionsParams
from sd3pipe.params.stage import shard_of_process
from sd3pipe.picture_losses import read_picture_losses
from sd3pipe.words import Precision

log = logging.getLogger(__name__)


def main(params: CheckCaptionsParams) -> None:
    """Asks the model what was not asked yet, and writes what the answers say."""
    inputs = params.as_inputs("model", "text", "latents", "adapter")
    with StageReport("check-captions", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        stamps = weight_stamps(params.out)
        source = find_component("mmdit", model=params.model, file=params.mmdit)
        device = choose_device(params.device, params.threads)
        precision = resolve_precision(params.mixed_precision, device)
        check = _check(params, source, source.fingerprint(stamps), precision)
        stamps.save()
        rows = ResultRows(shared_folder(params.text, "errors") or machine_folder(params.out) / "errors", "errors")
        part, parts = shard_of_process(params.shard)
        columns: list[Column | None] = [None, *check.adapters]
        missing = {column: _missing(check, rows, column) for column in columns}
        mine = {
            column: [item for item in questions if item.latent_row % parts == part]
            for column, questions in missing.items()
        }
        asked = sum(map(len, mine.values()))
        if asked:
            _ask(params, check, rows, mine, source, device, precision, report)
            rows.look_again()
        left = sum(len(_missing(check, rows, column)) for column in columns)
        report.update(asked=asked, left=left)
        if left:
            report.summary = f"{asked} answers made, {left} left to the other shards"
            return
        report.summary = _write(params, check, rows, report)


def _check(params: CheckCaptionsParams, source: ComponentSource, base: str, precision: Precision) -> CaptionCheck:
    asked = Asked(latents=CacheReader(params.latents), text=CacheReader(params.text), base=base, precision=precision)
    pictures, empty = read_pictures(asked, mmdit_architecture(source), most_others=params.other_captions)
    return CaptionCheck(
        asked=asked,
        pictures=pictures,
        empty_row=empty,
        noises=[Noise(sigma=sigma, draw=draw) for sigma in params.noise_levels() for draw in range(params.draws)],
        adapters=choose_columns(params.adapter, params.checkpoints, (1.0,))[1:],
    )


def _missing(check: CaptionCheck, rows: ResultRows, column: Column | None) -> list[Question]:
    questions = {item.key.key: item for item in check.questions(column)}
    return [questions[key.key] for key in rows.missing([item.key for item in questions.values()])]


def _ask(
    params: CheckCaptionsParams,
    check: CaptionCheck,
    rows: ResultRows,
    missing: dict[Column | None, list[Question]],
    source: ComponentSource,
    device: torch.device,
    precision: Precision,
    report: StageReport,
) -> None:
    """Answers questions with the base, then with each adapter, and tells beforehand what that takes."""
    architecture, dtype = mmdit_architecture(source), BASE_DTYPES[precision]
    swapped = params.blocks_to_swap
    if swapped == "auto":
        tokens = max(_tokens(check, item) for questions in missing.values() for item in questions)
        swapped = blocks_to_sample(
            architecture, tokens=tokens * params.caption_batch_size // 2, device=device, dtype=dtype
        )
    total = sum(map(len, missing.values()))
    with memory_errors(functools.partial(way_out, swapped, architecture.depth)):
        mmdit, streamer = load_base(source, dtype=dtype, device=device, settings=Settings(blocks_to_swap=swapped))
        answerer = Answerer(
            check.asked,
            mmdit,
            device=device,
            empty_row=check.empty_row,
            batch_size=params.caption_batch_size,
            dtype=dtype,
        )
        with streamer:
            passes, seconds = _forecast(answerer, missing)
            log.info(
                "check-captions: %s, %s through the model: about %s",
                count(total, "answer"), count(passes, "pass", "passes"), readable_seconds(seconds),
            )  # fmt: skip
            with progress("check-captions", total, "answers") as bar:
                for column, questions in missing.items():
                    if questions:
                        with adapted(mmdit, column or Column(label="base"), device):
                            rows.add(answerer.answers(questions, bar))
                        report.begin()


def _forecast(answerer: Answerer, missing: dict[Column | None, list[Question]]) -> tuple[int, float]:
    """Returns how many batches go through the model, and about how long that takes: the second of two is timed."""
    passes = sum(answerer.passes(questions) for questions in missing.values())
    first = next(item for questions in missing.values() for item in questions)
    answerer.answer_one(first)
    start = time.monotonic()
    answerer.answer_one(first)
    return passes, passes * (time.monotonic() - start)


def _tokens(check: CaptionCheck, question: Question) -> int:
    shapes = check.asked.latents.shapes(question.latent_row)
    height, width = next(iter(shapes.values()))[-2:]
    return image_tokens(height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)


def _write(params: CheckCaptionsParams, check: CaptionCheck, rows: ResultRows, report: StageReport) -> str:
    """Writes the JSON file and the page beside it, and returns the summary."""
    pictures = check.checked(rows)
    for column in check.adapters:
        pictures = check.learnt(rows, column, pictures)  # of several checkpoints, the last one's stands at the picture
    if params.adapter is not None:
        pictures = with_training(pictures, read_picture_losses(params.adapter))
    suspects = [item.full_name for item in pictures if item.suspect]
    nothing = [item.full_name for item in pictures if item.changes_nothing]
    findings = CaptionFindings(
        pictures=tuple(pictures),
        suspects=tuple(suspects),
        change_nothing=tuple(nothing),
        checkpoints=tuple(check.summary(rows, column) for column in check.adapters),
    )
    make_folder(params.out.absolute().parent)
    findings.save(params.out)
    page = params.out.with_suffix(".html")
    write_text(page, render_findings(findings))
    report.update(pictures=len(pictures), suspects=suspects, change_nothing=nothing)
    said = [count(len(pictures), "picture"), _named("do not fit their captions", suspects)]
    if nothing:
        said.append(_named("have captions that change nothing", nothing))
    if check.adapters:
        words = [item.learnt for item in pictures if item.learnt]
        said.append(", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words))))
    return "; ".join([*said, f"see {page}"])


def _named(what: str, names: Sequence[str]) -> str:
    return f"{len(names)} {what}{': ' + listed(names) if names else ''}"
