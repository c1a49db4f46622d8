"""What lies ahead of `sd3pipe run`: pictures, captions, steps, disk, memory and, where a report knows it, time.

Told from names, headers and earlier reports, without torch, so that it costs no time itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.adapters.find import checkpoint_adapters
from sd3pipe.adapters.options import described_adapter
from sd3pipe.adapters.weights import activation_rank, adapter_weights
from sd3pipe.cache.folder import machine_folder
from sd3pipe.config import Project
from sd3pipe.console import count, readable_bytes, readable_seconds
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import Sd3pipeError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.memory.choosing import Freedom, Limits, fitting_settings
from sd3pipe.memory.plan import PROCESS_BYTES, Settings, Workload, adapter_bytes_per_weight, option_text, predict
from sd3pipe.memory.sizes import image_tokens, model_size
from sd3pipe.models.hub import is_hub_id
from sd3pipe.models.row_sizes import known_text_sizes, known_vae, t5_tokens_at_most, text_advice, text_bytes
from sd3pipe.models.shapes import linear_sizes
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.params.caption import CaptionParams
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.fields import Params
from sd3pipe.params.train import TrainParams
from sd3pipe.project.amounts import known_texts, read_amounts, read_prompts
from sd3pipe.project.card import card_bytes
from sd3pipe.project.inputs import stage_options
from sd3pipe.stages import STAGES_BY_NAME
from sd3pipe.words import CLIP_TOKENS, FORMAT_BYTES

_KEPT_STATES = 2  # optimizer states of a run


@dataclass(slots=True)
class Ahead:
    """What one stage has before it: `facts` to show, the bytes that it will write at most, and how to write fewer."""

    facts: list[str] = field(default_factory=list)
    disk_bytes: int = 0
    advice: str | None = None


def ahead(options: Params, project: Project) -> Ahead:
    """Returns what a stage with these checked options has before it."""
    found = Ahead()
    if isinstance(options, CaptionParams) and options.dataset is not None:
        found.facts.append(count(read_amounts(options.dataset).pictures, "picture"))
    elif isinstance(options, EncodeTextParams):
        _encode_text(options, found)
    elif isinstance(options, EncodeLatentsParams):
        _encode_latents(options, found)
    elif isinstance(options, TrainParams):
        _train(options, project, found)
    return found


def _encode_text(options: EncodeTextParams, found: Ahead) -> None:
    if options.sample_prompts is not None:
        prompts = read_prompts(options.sample_prompts)
        known, others = {"", *(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt))}, 0
        shown = count(len(prompts), "prompt")
    else:
        assert options.dataset is not None
        assert options.out is not None
        stamps = FileStamps(machine_folder(options.out) / "stat.json")
        known, others = known_texts(options.dataset, caption_variants=options.caption_variants, stamps=stamps)
        shown = count(len(known) + others, "caption")
    found.facts.append(shown)
    assert options.out is not None
    sizes = known_text_sizes(options.model, {name: getattr(options, name) for name in ENCODERS})
    longest = options.t5xxl_max_token_length
    t5_tokens = t5_tokens_at_most(known, pad_to=options.t5_pad_to or longest, max_length=longest)
    t5_tokens[longest] += others
    texts = t5_tokens.total()
    _cache(options.out, texts, text_bytes(t5_tokens, sizes, options.text_dtype, packed=options.t5xxl_row_dtype), found)
    if found.disk_bytes:
        found.disk_bytes += texts * sizes.row_bytes(0, options.text_dtype)  # CLIP's outputs, until T5's are there
        found.advice = text_advice(t5_tokens, sizes, text_dtype=options.text_dtype, packed=options.t5xxl_row_dtype)


def _encode_latents(options: EncodeLatentsParams, found: Ahead) -> None:
    amounts = read_amounts(options.dataset, crop_variants=options.crop_variants)
    found.facts.append(count(amounts.pictures, "picture"))
    if amounts.rows != amounts.pictures:
        found.facts.append(f"{amounts.rows:,} with their crops and flips")
    vae, moments = known_vae(options.model, options.vae), options.latent_mode == "moments"
    value_bytes = FORMAT_BYTES[options.latent_dtype]
    size = sum(
        rows * vae.row_bytes(size, moments=moments, value_bytes=value_bytes)
        for size, rows in amounts.rows_by_size.items()
    )
    _cache(options.out, amounts.rows, size, found)


def _cache(out: Path, rows: int, size: int, found: Ahead) -> None:
    """Adds the size of a cache, and the time that an earlier report tells."""
    if (out / "manifest.json").is_file():
        found.facts.append(f"{out} is there: only what changed is encoded")
        return
    found.facts.append(f"at most {readable_bytes(size)}")
    found.disk_bytes = size
    report = _report(Path(f"{out}.report.json"))
    if report.get("encoded"):
        found.facts.append(f"about {readable_seconds(rows * report['seconds'] / report['encoded'])} as last time")


def _train(options: TrainParams, project: Project, found: Ahead) -> None:
    done = max(checkpoint_adapters(options.out), default=0)
    batches, every = options.batches, options.saving.save_every_n_steps
    if batches.max_train_epochs is not None:
        found.facts.append(count(batches.max_train_epochs, "epoch"))
    else:
        found.facts.append(count(batches.max_train_steps, "step") + (f", {done:,} saved" if done else ""))
        seconds = _report(options.out / "report.json").get("seconds_per_step")
        if seconds and done < batches.max_train_steps:
            found.facts.append(f"about {readable_seconds((batches.max_train_steps - done) * seconds)} as last time")
    is_remote = is_hub_id(options.model) and not Path(options.model).expanduser().exists()
    if options.mmdit is not None or not is_remote:  # which would take the network
        shapes = find_component("mmdit", model=options.model, file=options.mmdit).shapes()
        weights = adapter_weights(linear_sizes(shapes), described_adapter(options.adapter))
        saved = batches.max_train_steps // every if every else 1
        found.disk_bytes = 4 * weights * (saved + 1) + _KEPT_STATES * 8 * weights
        found.facts += _memory(options, shapes, weights, project)


def _memory(
    options: TrainParams, shapes: Mapping[str, tuple[int, ...]], weights: int, project: Project
) -> Iterator[str]:
    """Yields what a step takes of the card, if there is one to train on and the pictures' size is known here."""
    card = card_bytes() if options.device != "cpu" else None
    size = _largest_picture(project)
    if card is None or size is None:
        return
    encode_text = stage_options(project, STAGES_BY_NAME["encode-text"])
    assert isinstance(encode_text, EncodeTextParams)
    work = Workload(
        image_tokens=image_tokens(*size),
        text_tokens=CLIP_TOKENS + encode_text.t5xxl_max_token_length,
        batch=options.batches.train_batch_size,
        accumulation=options.batches.gradient_accumulation_steps,
        adapter_weights=weights,
        adapter_rank=activation_rank(described_adapter(options.adapter)),
        adapter_bytes_per_weight=adapter_bytes_per_weight(options.optimizer.optimizer_type),
    )
    is_open = options.memory.blocks_to_swap == "auto"
    model = model_size(shapes)
    dtype_bytes = 4 if options.mixed_precision == "no" else 2
    wanted = Settings.of(options.memory, dtype_bytes=dtype_bytes, depth=model.depth)
    freedom = Freedom.of(options.memory, modulation_is_open="modulation" not in options.model_fields_set)
    fits = fitting_settings(model, work, wanted, Limits(device_bytes=card), freedom=freedom)
    settings, prediction = fits or (wanted, predict(model, work, wanted))
    needed = f"{readable_bytes(prediction.device_bytes)} of the card's {readable_bytes(card)}"
    if prediction.device_bytes > card:
        yield f"needs {needed}: `sd3pipe plan --vram {card / 1e9:.0f}GB` looks for settings that fit"
        return
    yield f"{needed} ({option_text(settings, model.depth)})" if is_open and settings.blocks_to_swap else needed
    yield f"{readable_bytes(max(0, prediction.host_bytes - PROCESS_BYTES))} of host memory"


def _largest_picture(project: Project) -> tuple[int, int] | None:
    try:
        return read_amounts(Path(project.paths["dataset"])).largest_px
    except (Sd3pipeError, OSError):  # a machine that only trains has no dataset
        return None


def _report(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, TypeAdapter(dict[str, Any]))
    except (OSError, DocumentError):
        return {}
