"""`sd3pipe plan`: memory, copies, seconds and disk of a training run, from headers alone."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3pipe.cache.folder import machine_folder
from sd3pipe.console import readable_bytes, readable_seconds, say, say_json
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan
from sd3pipe.encoding.latent_plan import find_sources
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.memory.plan import (
    Prediction,
    Rates,
    Settings,
    Workload,
    adapter_bytes_per_weight,
    fitting_settings,
    option_text,
    predict,
)
from sd3pipe.memory.sizes import (
    CLIP_TOKENS,
    ModelSize,
    adapter_weights,
    image_tokens,
    latent_bytes,
    model_size,
    text_row_bytes,
)
from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.params.plan import PlanParams
from sd3pipe.stat_memory import StatMemory


def main(params: PlanParams) -> None:
    """Prints the plan. Raises InputError, and ParameterError for more blocks than there are."""
    shapes = _shapes(params)
    model = model_size(shapes)
    work, wanted = _workload(params, shapes), _settings(params)
    rates = None
    if params.tflops is not None:
        rates = Rates(flop_per_second=params.tflops * 1e12, copy_bytes_per_second=params.copy_gb_per_second * 1e9)
    rows = _rows(params, model, work, wanted, rates)
    chosen = _chosen(params, model, work, wanted, rates)
    disk = _disk(params)
    if params.json_output:
        say_json(_as_json(shapes, model, rows, chosen, disk))
        return
    say(_header_text(shapes, model, params), *_table(rows), _verdict(params, chosen))
    if disk:
        say("disk: " + ", ".join(f"{name} {readable_bytes(size)}" for name, size in disk.items()))


def _shapes(params: PlanParams) -> dict[str, tuple[int, ...]]:
    if params.model is None and params.mmdit is None:
        raise ParameterError("sd3pipe plan needs --model or --mmdit: a checkpoint file, a diffusers folder or a hub id")
    source = find_component("mmdit", model=params.model, file=params.mmdit)
    try:
        detect_mmdit(source.shapes())
    except InputError as error:
        raise InputError(f"{source.where}: {error}") from error
    return dict(source.shapes())


def _workload(params: PlanParams, shapes: Mapping[str, tuple[int, ...]]) -> Workload:
    width, height = params.size_px
    return Workload(
        image_tokens=image_tokens(width, height),
        text_tokens=CLIP_TOKENS + params.t5xxl_max_token_length,
        batch=params.train_batch_size,
        accumulation=params.gradient_accumulation_steps,
        adapter_weights=adapter_weights(shapes, params.network_dim),
        adapter_bytes_per_weight=adapter_bytes_per_weight(params.optimizer_type),
    )


def _settings(params: PlanParams) -> Settings:
    return Settings(
        base_format=params.base_dtype or "dense",
        blocks_to_swap=0 if params.blocks_to_swap == "auto" else params.blocks_to_swap,
        modulation=params.modulation or "stream",
        gradient_checkpointing=params.gradient_checkpointing,
        activation_offload=params.activation_offload,
        layer_major=params.layer_major,
        dtype_bytes=4 if params.mixed_precision == "no" else 2,
    )


def _rows(
    params: PlanParams, model: ModelSize, work: Workload, wanted: Settings, rates: Rates | None
) -> list[tuple[Settings, Prediction]]:
    """Returns what to show: the wanted count, or none, half and all blocks in three formats."""
    if params.blocks_to_swap != "auto":
        if params.blocks_to_swap > model.depth:
            raise ParameterError(f"--blocks-to-swap {params.blocks_to_swap}: the model has {model.depth} blocks")
        return [(wanted, predict(model, work, wanted, rates))]
    formats = ("dense", "fp8", "nf4") if params.base_dtype is None else (params.base_dtype,)
    counts = (0, model.depth // 2, model.depth)
    variations = [dataclasses.replace(wanted, base_format=f, blocks_to_swap=n) for f in formats for n in counts]
    return [(settings, predict(model, work, settings, rates)) for settings in variations]


def _chosen(
    params: PlanParams, model: ModelSize, work: Workload, wanted: Settings, rates: Rates | None
) -> tuple[Settings, Prediction] | None:
    """Returns the settings that auto would take for the given card, or the wanted ones if they fit it."""
    if params.vram_bytes is None:
        return None
    if params.blocks_to_swap == "auto":
        return fitting_settings(
            model,
            work,
            wanted,
            device_bytes=params.vram_bytes,
            host_bytes=params.ram_bytes,
            rates=rates,
            modes=("resident", "stream") if params.modulation is None else (params.modulation,),
        )
    prediction = predict(model, work, wanted, rates)
    ram = params.ram_bytes
    fits = prediction.device_bytes <= params.vram_bytes and (ram is None or prediction.host_bytes <= ram)
    return (wanted, prediction) if fits else None


def _disk(params: PlanParams) -> dict[str, int]:
    """Returns the bytes of the caches that a dataset fills, or nothing without one."""
    if params.dataset is None:
        return {}
    dataset = load_dataset(params.dataset)
    memory = StatMemory(machine_folder(Path("caches/latents")) / "stat.json")
    found = scan(dataset, memory)
    sources = find_sources(found, crop_variants=4, seed=42)
    pixels = sum(math.prod(sample.view.cut.size) for sample in sources.samples)
    captions = len({picture.caption for picture in found.pictures}) + 1  # and the empty one
    return {"latents": latent_bytes(pixels), "text": captions * text_row_bytes(params.t5xxl_max_token_length)}


def _header_text(shapes: Mapping[str, tuple[int, ...]], model: ModelSize, params: PlanParams) -> str:
    variant = detect_mmdit(dict(shapes)).variant
    width, height = params.size_px
    return (
        f"{variant}: {model.weights / 1e9:.2f} billion weights in {model.depth} blocks; "
        f"{width} x {height} pixels, batch {params.train_batch_size}"
        + (f" x {params.gradient_accumulation_steps}" if params.gradient_accumulation_steps > 1 else "")
        + f", rank {params.network_dim}"
    )


def _table(rows: list[tuple[Settings, Prediction]]) -> list[str]:
    lines = [f"{'settings':<44} {'device':>9} {'host':>9} {'copied/step':>12} {'step':>9}"]
    for settings, prediction in rows:
        seconds = "-" if prediction.seconds is None else readable_seconds(prediction.seconds)
        lines.append(
            f"{option_text(settings):<44} {readable_bytes(prediction.device_bytes):>9} "
            f"{readable_bytes(prediction.host_bytes):>9} {readable_bytes(prediction.copied_bytes):>12} {seconds:>9}"
        )
    if len(rows) == 1:
        lines += [f"  {name}: {readable_bytes(size)}" for name, size in rows[0][1].device_parts.items() if size]
    return lines


def _verdict(params: PlanParams, chosen: tuple[Settings, Prediction] | None) -> str:
    if params.vram_bytes is None:
        return "give --vram (and --ram) to see which settings fit, --tflops to see seconds"
    where = readable_bytes(params.vram_bytes)
    if params.ram_bytes is not None:
        where += f" and {readable_bytes(params.ram_bytes)} of host memory"
    if chosen is None:
        return f"nothing fits {where}: try --base-dtype int8 or nf4, a smaller picture or batch"
    settings, prediction = chosen
    return f"fits {where}: {option_text(settings)} (about {readable_bytes(prediction.device_bytes)} on the device)"


def _as_json(
    shapes: Mapping[str, tuple[int, ...]],
    model: ModelSize,
    rows: list[tuple[Settings, Prediction]],
    chosen: tuple[Settings, Prediction] | None,
    disk: dict[str, int],
) -> dict[str, Any]:
    return {
        "variant": detect_mmdit(dict(shapes)).variant,
        "weights": model.weights,
        "blocks": model.depth,
        "settings": [_row_as_json(*row) for row in rows],
        "fits": None if chosen is None else _row_as_json(*chosen),
        "disk_bytes": disk,
    }


def _row_as_json(settings: Settings, prediction: Prediction) -> dict[str, Any]:
    return {
        **dataclasses.asdict(settings),
        "device_bytes": prediction.device_bytes,
        "device_parts": prediction.device_parts,
        "host_bytes": prediction.host_bytes,
        "host_parts": prediction.host_parts,
        "copied_bytes_per_step": prediction.copied_bytes,
        "seconds_per_step": prediction.seconds,
        "compute_seconds_per_step": prediction.compute_seconds,
    }
