"""`sd3pipe export`: an adapter in the form of another program, or the base model with the adapter in it."""

import logging
import re
from pathlib import Path

import torch

from sd3pipe import stopping
from sd3pipe.adapters.files import AdapterFile, SavedAdapter, read_adapter, save_adapter
from sd3pipe.adapters.find import checkpoint_adapters, find_adapter, suggested_adapter
from sd3pipe.adapters.keymap import is_text_encoder
from sd3pipe.adapters.kind import Adapter, plain_adapter
from sd3pipe.console import StageReport, count, readable_bytes, say
from sd3pipe.device import choose_device
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.exporting.adapter_files import (
    as_report,
    as_summary,
    checkpoint_metadata,
    export_metadata,
    refuse_other_ending,
    refuse_to_replace,
)
from sd3pipe.exporting.base_weights import find_base, for_form
from sd3pipe.exporting.checkpoints import write_checkpoint
from sd3pipe.exporting.hub_card import card_text
from sd3pipe.exporting.hub_folder import (
    CARD,
    WEIGHTS,
    SamplePictures,
    hash_output,
    samples_for,
    write_card,
    write_pictures,
)
from sd3pipe.exporting.published import published
from sd3pipe.exporting.up_to_date import is_up_to_date, made_from
from sd3pipe.models.hub import is_hub_id
from sd3pipe.params.export import ExportParams
from sd3pipe.shell import no_option, shell_line

log = logging.getLogger(__name__)

_FAINT = 0.1  # share of a module's change that rounding may take before the user is told


def main(params: ExportParams) -> None:
    """Writes what was asked for and a report beside it. Raises InputError, ParameterError, StorageError."""
    inputs = params.as_inputs("adapter", "model", "format")
    with StageReport("export", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        device = choose_device(params.device, params.threads)
        _refuse_what_would_be_ignored(params)
        if params.checkpoints == "all":
            saved = _export_all(params, report)
            report.update(files={file.path.name: as_report(file) for file in saved})
            worst = max(file.largest_difference for file in saved)
            report.summary = f"{params.out}, {count(len(saved), 'file')}; read back, every change is within {worst:.1e}"
            return
        if params.checkpoints == "best":
            adapter, strength = suggested_adapter(params.adapter)
            if params.multiplier == 1.0:  # else it is the user's
                params = params.model_copy(update={"multiplier": strength})
        else:
            adapter = find_adapter(params.adapter)
        if params.format == "checkpoint":
            _merge(_read(adapter), params, device, report)
            return
        samples = samples_for(adapter) if params.format == "hub" else SamplePictures()
        identity = made_from(params, adapter, samples.files)
        if is_up_to_date(report.path, params.out, identity):
            report.keep()
            report.summary = f"nothing to do: {params.out} is what this would write"
        elif params.format == "hub":
            report.update(**_export_to_hub(_read(adapter), samples, params, report), made_from=identity)
        else:
            saved_file = _export(_read(adapter), params.out, params)
            report.update(**as_report(saved_file), made_from=identity, output=hash_output(params.out))
            report.summary = as_summary(saved_file)
    if params.format == "hub":
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", params.out.resolve().name).strip("-.") or "lora"
        say(f"to upload it: {shell_line(['hf', 'upload', f'YOUR-NAME/{name}', no_option(str(params.out))])}")


def _refuse_what_would_be_ignored(params: ExportParams) -> None:
    """Raises ParameterError for options that have no meaning together."""
    if params.format == "checkpoint" and params.dtype != "auto":
        raise ParameterError(f"--dtype {params.dtype}: a checkpoint keeps the base's number formats: leave --dtype out")
    if params.format == "hub" and (params.out.is_file() or params.out.suffix == ".safetensors"):
        raise ParameterError(f"--out {params.out}: --format hub writes a folder: name one, such as {params.out.stem}")


def _read(path: Path) -> AdapterFile:
    log.info("export: %s", path)
    return read_adapter(path)


def _at_strength(source: AdapterFile, multiplier: float) -> Adapter:
    """Returns the adapter that acts at strength 1 as the file's does at another. Raises ParameterError for a DoRA."""
    try:
        return {path: delta.scaled(multiplier) for path, delta in source.adapter.items()}
    except ParameterError as error:
        raise ParameterError(
            f"--multiplier {multiplier:g}: {error}: export it with --checkpoints or --adapter at 1 and load it at "
            f"{multiplier:g}, or merge it with --format checkpoint"
        ) from error


def _export(source: AdapterFile, out: Path, params: ExportParams) -> SavedAdapter:
    assert params.format not in ("checkpoint", "hub")
    if out.is_dir():
        raise ParameterError(f"{out}: is a folder: name a file, such as {out / 'my_lora.safetensors'}")
    refuse_other_ending(out)
    adapter = for_form(_at_strength(source, params.multiplier), params.format, params.model, params.mmdit)
    refuse_to_replace(out, [source.path])
    metadata = export_metadata(source.metadata, params, params.format, source.variants, multiplier=params.multiplier)
    return save_adapter(out, adapter, form=params.format, dtype=params.dtype, metadata=metadata)


def _export_to_hub(
    source: AdapterFile, samples: SamplePictures, params: ExportParams, report: StageReport
) -> dict[str, object]:
    """Writes the folder, the card last, and returns what the report says of it."""
    out = params.out
    words = params.model_copy(update={"metadata": params.metadata or "public"})
    metadata = export_metadata(source.metadata, words, "diffusers", source.variants, multiplier=params.multiplier)
    adapter = for_form(_at_strength(source, params.multiplier), "diffusers", params.model, params.mmdit)
    unread = next((delta for delta in adapter.values() if not delta.in_pipelines), None)
    if unread is not None:
        raise ParameterError(f"--format hub is for what diffusers' pipelines load, and they load no {unread.title}")
    refuse_to_replace(out / WEIGHTS, [source.path])
    saved = save_adapter(out / WEIGHTS, adapter, form="diffusers", dtype=params.dtype, metadata=metadata)
    report.begin()
    write_pictures(out, samples.files)
    hub_id = params.model.partition("@")[0] if params.model and is_hub_id(params.model) else None
    text = card_text(published(metadata or {}), hub_id=hub_id, samples=samples)
    card = write_card(out, text, report.path)
    if not samples.files:
        log.warning("%s has no sample pictures: the card shows none", params.adapter)
    report.summary = f"{as_summary(saved)}; with {CARD} and {count(len(samples.files), 'picture')}"
    return {**as_report(saved), "card": card, "pictures": len(samples.files), "output": hash_output(out)}


def _export_all(params: ExportParams, report: StageReport) -> list[SavedAdapter]:
    """Writes the adapter of every checkpoint, and the finished one, under names that sort by step."""
    if params.format in ("checkpoint", "hub"):
        raise ParameterError(f"--checkpoints all writes adapter files: --format {params.format} makes one at a time")
    steps = checkpoint_adapters(params.adapter)
    if not steps:
        raise InputError(f"{params.adapter}: has no checkpoints: --checkpoints all needs a run folder")
    name = params.adapter.resolve().name
    wanted = {f"{name}-step{step:08d}.safetensors": path for step, path in steps.items()}
    final = params.adapter / "final"
    if final.is_dir():
        wanted[f"{name}.safetensors"] = find_adapter(final)
    saved: list[SavedAdapter] = []
    for file, path in wanted.items():
        stopping.check()
        saved.append(_export(_read(path), params.out / file, params))
        report.begin()
    return saved


def _merge(source: AdapterFile, params: ExportParams, device: torch.device, report: StageReport) -> None:
    text = [path for path in source.adapter if is_text_encoder(path)]
    if text:
        raise ParameterError(f"--format checkpoint merges into the MMDiT, and the adapter also changes {text[0]}")
    base = find_base(params.model, params.mmdit, "--format checkpoint merges the adapter into a base model")
    refuse_to_replace(params.out, [source.path, *base.paths])
    model = Path(params.model).expanduser() if params.model and params.mmdit is None else None
    merged = write_checkpoint(
        params.out,
        plain_adapter(source.adapter),
        base,
        model,
        multiplier=params.multiplier,
        metadata=checkpoint_metadata(source, base, model, params),
        device=device,
    )
    if merged.largest_rounding > _FAINT:
        log.warning(
            "the base's number format takes %.0f %% of the adapter's change at %s: a base in fp32 would keep it",
            100 * merged.largest_rounding,
            merged.largest_at,
        )
    report.update(form="checkpoint", modules=merged.changed, bytes=merged.nbytes)
    report.update(largest_difference=merged.largest_rounding, largest_difference_at=merged.largest_at)
    report.summary = (
        f"{merged.path}, {count(merged.changed, 'tensor')} changed, {readable_bytes(merged.nbytes)}; read back, "
        f"every bit as written; rounding takes at most {merged.largest_rounding:.1%} of a module's change"
    )
