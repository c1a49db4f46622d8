"""Starting values per model and goal, each with where it comes from; measured advice replaces them as it appears.

Published by others and not measured here, unless a note says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    "learning_rate": Advice(value=1e-4, source="sd-scripts' SD3 guide, ai-toolkit; SimpleTuner calls it stable."),
    "lr_scheduler": Advice(value="constant_with_warmup", source="SD3.5 breaks on large early steps."),
    "max_train_steps": Advice(value=2000, source="ai-toolkit's range is 500 to 4000; watch the samples."),
}
_BY_VARIANT: Mapping[Variant, Recipe] = {
    "sd3-medium": {},
    "sd35-medium": {},
    "sd35-large": {
        "max_grad_norm": Advice(value=0.1, source="SimpleTuner's SD3 guide: 3.5-large needs hard clipping.")
    },
    "sd35-large-turbo": {
        "max_grad_norm": Advice(value=0.1, source="SimpleTuner's SD3 guide: 3.5-large needs hard clipping."),
        "training_shift": Advice(value=3.0, source="As the model samples: few steps, most of them at high noise."),
    },
}
_BY_GOAL: Mapping[Goal, Recipe] = {
    "subject": {},
    "style": {
        "goal": Advice(value="style", source="CLIP and DINO hardly see styles, so judge suggests nothing."),
        "max_train_steps": Advice(value=4000, source="The upper end of ai-toolkit's range: a style has many sides."),
    },
    "concepts": {
        "goal": Advice(value="concepts", source="As init was told."),
        "adapter_type": Advice(value="loha", source="Several concepts bleed less with LoHa (sd-scripts issue 1802)."),
    },
}


def recipe(variant: Variant, goal: Goal) -> Recipe:
    """Returns the advised values; what the goal says beats what the model says."""
    return {**_COMMON, **_BY_VARIANT[variant], **_BY_GOAL[goal]}
