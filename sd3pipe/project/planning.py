"""What a training run takes in several settings: memory, copies, seconds and disk, from headers. Free of torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from sd3pipe.adapters.options import described_adapter
from sd3pipe.adapters.weights import activation_rank, adapter_weights
from sd3pipe.config import Project
from sd3pipe.console import readable_bytes, readable_seconds
from sd3pipe.errors import ParameterError
from sd3pipe.memory.choosing import Freedom, Limits, PlanRow, alternatives, fitting_settings
from sd3pipe.memory.plan import Prediction, Rates, Settings, Workload, adapter_bytes_per_weight, option_text, predict
from sd3pipe.memory.sizes import ModelSize, image_tokens, model_size
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import find_component
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.plan import PlanParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.train import TrainParams
from sd3pipe.project.amounts import read_amounts
from sd3pipe.rules.adapter import AdapterRules
from sd3pipe.rules.memory import MemoryRules
from sd3pipe.words import CLIP_TOKENS, MMDiTVariant

_USUAL_PX = (1024, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ways to keep a model and what a step takes then; the one that the given card wants; what caches take."""

    variant: MMDiTVariant
    model: ModelSize
    rows: list[PlanRow]
    chosen: PlanRow | None
    others: list[PlanRow]
    size_px: tuple[int, int]  # width, height of a picture
    disk: Mapping[str, int]

    def as_json(self) -> dict[str, JsonValue]:
        """Returns everything as JSON types."""
        return {
            "variant": self.variant,
            "weights": self.model.weights,
            "blocks": self.model.depth,
            "size_px": [*self.size_px],
            "settings": [_as_json(*row) for row in self.rows],
            "fits": None if self.chosen is None else _as_json(*self.chosen),
            "alternatives": [_as_json(*row) for row in self.others],
            "disk_bytes": {**self.disk},
        }

    def cells(self) -> list[tuple[str, str, str, str, str]]:
        """Returns the rows as words: settings, memory of device and host, bytes copied in a step, and its time."""
        return [
            (
                option_text(settings, self.model.depth),
                readable_bytes(found.device_bytes),
                readable_bytes(found.host_bytes),
                readable_bytes(found.copied_bytes),
                "-" if found.seconds is None else readable_seconds(found.seconds),
            )
            for settings, found in self.rows
        ]

    def table(self) -> list[str]:
        """Returns the rows in aligned columns; of a single one, the parts of its device memory, too."""
        rows = [("settings", "device", "host", "copied/step", "step"), *self.cells()]
        width = max(len(name) for name, *_ in rows[1:])
        lines = [
            f"{name:<{width}} {card:>9} {host:>9} {copied:>12} {step:>9}" for name, card, host, copied, step in rows
        ]
        if len(self.rows) == 1:
            lines += [
                f"  {name}: {readable_bytes(size)}" for name, size in self.rows[0][1].device_parts.items() if size
            ]
        return lines


def with_options_of_training(params: PlanParams, project: Project | None) -> tuple[PlanParams, AdapterRules]:
    """Returns the options with those of the project's training where they were not given, and the adapter.

    Raises ParameterError.
    """
    if project is None or not project.stage_file("train").is_file():
        return params, AdapterRules(network_dim=params.network_dim, adapter_type=params.adapter_type)
    given = {"model": str(params.model or params.mmdit), "allow_code": True}  # of which nothing is imported here
    train = resolve(TrainParams, "train", given, project=project, stage_models=load_stage_models)
    shared = PlanParams.model_fields.keys() & train.model_fields_set - params.model_fields_set
    if params.model != project.paths.get("model"):
        shared.discard("mmdit")
    if train.mixed_precision == "auto":  # which is for the card to say
        shared.discard("mixed_precision")
    params = params.model_copy(update={name: getattr(train, name) for name in shared})
    adapter = dataclasses.replace(train.adapter, network_dim=params.network_dim, adapter_type=params.adapter_type)
    return params, adapter


def make_plan(params: PlanParams, adapter: AdapterRules, *, t5_tokens: int, disk: Mapping[str, int]) -> Plan:
    """Returns the plan for an adapter and texts of so many T5 tokens; `disk` is what caches take.

    Raises InputError, and ParameterError for more blocks than there are.
    """
    if params.model is None and params.mmdit is None:
        raise ParameterError("sd3pipe plan needs --model or --mmdit: a checkpoint file, a diffusers folder or a hub id")
    size_px = params.size_px or (_USUAL_PX if params.dataset is None else read_amounts(params.dataset).largest_px)
    source = find_component("mmdit", model=params.model, file=params.mmdit)
    architecture, spec = mmdit_architecture(source), described_adapter(adapter)
    model, sizes = model_size(source.shapes()), architecture.linear_sizes()
    work = Workload(
        image_tokens=image_tokens(*size_px),
        text_tokens=CLIP_TOKENS + t5_tokens,
        batch=params.train_batch_size,
        accumulation=params.gradient_accumulation_steps,
        adapter_weights=adapter_weights(sizes, spec),
        adapter_rank=activation_rank(spec),
        adapter_bytes_per_weight=adapter_bytes_per_weight(params.optimizer_type),
    )
    dtype_bytes = 4 if params.mixed_precision == "no" else 2
    wanted = Settings.of(params.rules(MemoryRules), dtype_bytes=dtype_bytes, depth=model.depth)
    wanted = dataclasses.replace(wanted, modulation=params.modulation or "stream")
    rates = None
    if params.tflops is not None:
        rates = Rates(
            flop_per_second=params.tflops * 1e12,
            copy_bytes_per_second=params.copy_gb_per_second * 1e9,
            read_bytes_per_second=params.read_gb_per_second * 1e9,
        )
    chosen, others = _chosen(params, model, work, wanted, rates)
    return Plan(
        variant=architecture.variant,
        model=model,
        rows=[(settings, predict(model, work, settings, rates)) for settings in _shown(params, model.depth, wanted)],
        chosen=chosen,
        others=others,
        size_px=size_px,
        disk=disk,
    )


def _shown(params: PlanParams, depth: int, wanted: Settings) -> list[Settings]:
    """Returns what to show: the wanted count, or none, half and all blocks in three formats if none is wanted."""
    if params.blocks_to_swap != "auto":
        return [wanted]
    formats = ("dense", "fp8", "nf4") if wanted.base_format == "dense" else (wanted.base_format,)
    counts = (0, depth // 2, depth)
    return [dataclasses.replace(wanted, base_format=f, blocks_to_swap=n) for f in formats for n in counts]


def _chosen(
    params: PlanParams, model: ModelSize, work: Workload, wanted: Settings, rates: Rates | None
) -> tuple[PlanRow | None, list[PlanRow]]:
    """Returns the settings that train would take on the given card, and what else there would be."""
    if params.vram_bytes is None:
        return None, []
    limits = Limits(device_bytes=params.vram_bytes, host_bytes=params.ram_bytes)
    freedom = Freedom.of(params.rules(MemoryRules), modulation_is_open=params.modulation is None)
    chosen = fitting_settings(model, work, wanted, limits, rates=rates, freedom=freedom)
    if chosen is None:
        return None, []
    return chosen, alternatives(model, work, chosen, limits, rates=rates, freedom=freedom)


def _as_json(settings: Settings, prediction: Prediction) -> dict[str, JsonValue]:
    return {
        **dataclasses.asdict(settings),
        "device_bytes": prediction.device_bytes,
        "device_parts": {**prediction.device_parts},
        "host_bytes": prediction.host_bytes,
        "host_parts": {**prediction.host_parts},
        "copied_bytes_per_step": prediction.copied_bytes,
        "seconds_per_step": prediction.seconds,
        "compute_seconds_per_step": prediction.compute_seconds,
    }
