"""What a card's memory advises: the planner's settings, and the optimizer that small cards need."""

from collections.abc import Mapping

from sd3pipe.errors import InputError
from sd3pipe.memory.choosing import Limits, fitting_settings
from sd3pipe.memory.plan import Settings, Workload, adapter_bytes_per_weight
from sd3pipe.memory.sizes import adapter_weights, image_tokens, model_size
from sd3pipe.project.recipes import Advice, Recipe

_SMALL_CARD_BYTES = 16 * 2**30
_RANK = 16
_BASES = ("dense", "fp8", "nf4")  # the gentlest first


def fitting_advice(
    shapes: Mapping[str, tuple[int, ...]], *, vram_bytes: int, resolution: int, batch: int = 1
) -> Recipe:
    """Returns the memory options that fit a card. Raises InputError if nothing does."""
    optimizer = "AdamW8bit" if vram_bytes <= _SMALL_CARD_BYTES else "AdamW"
    model = model_size(shapes)
    work = Workload(
        image_tokens=image_tokens(resolution, resolution),
        batch=batch,
        adapter_weights=adapter_weights(shapes, _RANK),
        adapter_rank=_RANK,
        adapter_bytes_per_weight=adapter_bytes_per_weight(optimizer),
    )
    for base in _BASES:
        found = fitting_settings(model, work, Settings(base_format=base), Limits(device_bytes=vram_bytes))
        if found is not None:
            settings, prediction = found
            needed = f"{prediction.device_bytes / 1e9:.1f} GB of {vram_bytes / 1e9:.1f} GB"
            return _advice(settings, optimizer, f"{_placed(settings, model.depth)}, for {needed} at batch {batch}.")
    raise InputError(
        f"nothing fits {vram_bytes / 1e9:.1f} GB at {resolution} x {resolution} pixels: take a lower --resolution, or "
        "look at `sd3pipe plan`"
    )


def _placed(settings: Settings, depth: int) -> str:
    if not settings.blocks_to_swap:
        return "The planner finds room for the whole model on the card"
    least = f"{settings.blocks_to_swap} of {depth} blocks streamed at least"
    return f"The planner expects {least}, more where train measures that to be quicker"


def _advice(settings: Settings, optimizer: str, source: str) -> Recipe:
    """Returns what has to be decided beforehand; train itself chooses how much is streamed and kept."""
    advice: dict[str, Advice] = {"blocks_to_swap": Advice(value="auto", source=source)}
    if optimizer != "AdamW":
        advice["optimizer_type"] = Advice(value=optimizer, source="8-bit moments, for cards of 16 GB and less.")
    if settings.base_format != "dense":
        advice["base_dtype"] = Advice(value=settings.base_format, source=source)
    return advice
