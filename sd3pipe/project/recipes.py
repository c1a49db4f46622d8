"""Starting values per model and goal, each with where it comes from; measured advice replaces them as it appears.

Published by others and not measured here, unless a note says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.weights import adapter_weights
from sd3pipe.console import count
from sd3pipe.errors import InputError
from sd3pipe.memory.choosing import Limits, fitting_settings
from sd3pipe.memory.plan import Settings, Workload, adapter_bytes_per_weight
from sd3pipe.memory.sizes import image_tokens, model_size
from sd3pipe.models.shapes import linear_sizes
from sd3pipe.words import Goal, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One option's value and why."""

    value: Any
    source: str


Recipe = Mapping[str, Advice]

_COMMON: Recipe = {
    "network_dim": Advice(value=16, source="sd-scripts' SD3 guide and ai-toolkit's 3.5-large example use 16."),
    "network_alpha": Advice(
        value=16.0, source="ai-toolkit: equal to the rank, so that the learning rate means itself."
    ),
    "learning_rate": Advice(
        value=1e-4,
        source="sd-scripts' SD3 guide, ai-toolkit; SimpleTuner calls it stable. Sources that all claim success go from "
        "1e-5 (SimpleTuner, other optimizers) to 1e-3, a factor of 100 (rank, batch and clipping differ with it): "
        "nobody has measured it.",
    ),
    "lr_scheduler": Advice(value="constant_with_warmup", source="SD3.5 breaks on large early steps."),
    "max_sample_prompts": Advice(
        value=4,
        source="Two with what is learnt, two without. All sixteen would be 1,280 passes of SD3.5-medium, each time; "
        "judge draws them once.",
    ),
}
_HARD_CLIPPING = Advice(
    value=0.1, source="SimpleTuner's SD3 guide: 3.5-large needs hard clipping, and larger batches help it much."
)
_RATE_OF_LARGE = Advice(
    value=1e-4,
    source="ai-toolkit's 3.5-large example; SimpleTuner calls it stable, and its guide says that 4e-5 can explode. A "
    "tutorial that the model's makers link takes 1e-3 at rank 128 and batch 6 for a style (second-hand), 25 times as "
    "much: nobody has measured it.",
)
_BY_VARIANT: Mapping[Variant, Recipe] = {
    "sd3-medium": {
        "learning_rate": Advice(
            value=1e-4,
            source="sd-scripts' SD3 guide. OneTrainer's preset takes 3e-4 at batch 4, diffusers' README 4e-4 at 512 px "
            "with accumulation 4 and 500 steps: nobody has measured which is better.",
        )
    },
    "sd35-medium": {},
    "sd35-large": {"learning_rate": _RATE_OF_LARGE, "max_grad_norm": _HARD_CLIPPING},
    "sd35-large-turbo": {
        "learning_rate": _RATE_OF_LARGE,
        "max_grad_norm": _HARD_CLIPPING,
        "training_shift": Advice(value=3.0, source="As the model samples: few steps, most of them at high noise."),
    },
}
_BY_GOAL: Mapping[Goal, Recipe] = {
    "person": {
        "goal": Advice(value="person", source="As init was told."),
        "train_layers": Advice(
            value="attention",
            source="Attention alone, without adaLN, may keep anatomy: diffusers' default, in its SD3 notes after "
            "Stability's guidance (second-hand). The same says that leaving the last blocks alone keeps "
            "photorealism, and not how many; network_args takes such blocks as train_block_indices.",
        ),
    },
    "object": {},
    "style": {
        "goal": Advice(value="style", source="CLIP and DINO hardly see styles, so judge suggests nothing."),
        "network_dim": Advice(
            value=16,
            source="As for other goals; a tutorial that the model's makers link takes 128 for a style on 3.5-large.",
        ),
    },
    "concept": {
        "goal": Advice(value="concept", source="As init was told."),
        "adapter_type": Advice(value="loha", source="Several concepts bleed less with LoHa (sd-scripts issue 1802)."),
    },
}
_TIMES_SEEN: Mapping[Goal, int] = {"person": 100, "object": 100, "style": 200, "concept": 100}
_STEPS = range(500, 4001)
_SMALL_CARD_BYTES = 16 * 2**30
_RANK = 16
_BASES = ("dense", "fp8", "nf4")  # the gentlest first
_COMFYUI = Advice(value=77, source="ComfyUI pads T5 to 77 tokens, and --loras-dir says that the adapter goes there.")
_ONE_BY_ONE = (
    "As many pictures a step as --train-batch-size said, one by one: with t5_pad_to = 77 each caption of more tokens "
    "keeps its own length, and only equal lengths share a batch. Where none is longer, that number as "
    "train_batch_size, with gradient_accumulation_steps = 1, learns the same and may be quicker."
)


def recipe(variant: Variant, goal: Goal, *, for_comfyui: bool = False) -> Recipe:
    """Returns the advised values; what the goal says beats what the model says."""
    return {**_COMMON, **_BY_VARIANT[variant], **_BY_GOAL[goal], **({"t5_pad_to": _COMFYUI} if for_comfyui else {})}


def length_advice(goal: Goal, *, pictures: int, in_an_epoch: int, batch: int, for_comfyui: bool = False) -> Recipe:
    """Returns steps and batch for a number of pictures, `in_an_epoch` with their repeats.

    Padded as in ComfyUI, long captions have many lengths and would seldom fill a batch: steps add pictures up instead.
    """
    times = _TIMES_SEEN[goal]
    steps = min(max(times * pictures // batch, _STEPS.start), _STEPS.stop - 1)
    epochs = count(max(1, round(steps * batch / in_an_epoch)), "epoch")
    source = (
        f"About {epochs} of {count(in_an_epoch, 'picture')} at {count(batch, 'picture')} a step: each {times} times, "
        f"as 20 pictures in {times * 20} steps, within ai-toolkit's {_STEPS.start} to {_STEPS.stop - 1}; watch the "
        "samples."
    )
    advice = {"max_train_steps": Advice(value=steps, source=source)}
    if batch > 1 and for_comfyui:
        advice["gradient_accumulation_steps"] = Advice(value=batch, source=_ONE_BY_ONE)
    elif batch > 1:
        advice["train_batch_size"] = Advice(value=batch, source="As --train-batch-size said.")
    return advice


def fitting_advice(
    shapes: Mapping[str, tuple[int, ...]], *, vram_bytes: int, resolution: int, batch: int = 1
) -> Recipe:
    """Returns the memory options that fit a card. Raises InputError if nothing does."""
    optimizer = "AdamW8bit" if vram_bytes <= _SMALL_CARD_BYTES else "AdamW"
    model = model_size(shapes)
    work = Workload(
        image_tokens=image_tokens(resolution, resolution),
        batch=batch,
        adapter_weights=adapter_weights(linear_sizes(shapes), AdapterSpec(rank=_RANK)),
        adapter_rank=_RANK,
        adapter_bytes_per_weight=adapter_bytes_per_weight(optimizer),
    )
    for base in _BASES:
        found = fitting_settings(model, work, Settings(base_format=base), Limits(device_bytes=vram_bytes))
        if found is not None:
            break
    else:
        raise InputError(
            f"nothing fits {vram_bytes / 1e9:.1f} GB at {resolution} x {resolution} pixels: take a lower --resolution, "
            "or look at `sd3pipe plan`"
        )
    settings, prediction = found
    needed = f"{prediction.device_bytes / 1e9:.1f} GB of {vram_bytes / 1e9:.1f} GB at batch {batch}"
    if settings.blocks_to_swap:
        least = f"{settings.blocks_to_swap} of {model.depth} blocks streamed at least"
        source = f"The planner expects {least}, more where train measures that to be quicker, for {needed}."
    else:
        source = f"The planner finds room for the whole model on the card, for {needed}."
    # what has to be decided beforehand: train itself chooses how much is streamed and kept
    advice: dict[str, Advice] = {"blocks_to_swap": Advice(value="auto", source=source)}
    if optimizer != "AdamW":
        advice["optimizer_type"] = Advice(value=optimizer, source="8-bit moments, for cards of 16 GB and less.")
    if settings.base_format != "dense":
        advice["base_dtype"] = Advice(value=settings.base_format, source=source)
    return advice
