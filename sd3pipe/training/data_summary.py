"""What a run trained on, in the numbers that a report shows."""

from collections import Counter
from typing import Any

import numpy as np

from sd3pipe.training.items import Items
from sd3pipe.training.training_data import TrainingData

_PIXELS_PER_LATENT = 8


def data_summary(data: TrainingData) -> dict[str, Any]:
    """Returns counts of pictures, captions, sizes and subsets as JSON types."""
    train, held_out = data.train, data.validation
    return {
        "pictures": len(train),
        "held_out": len(held_out),
        "pictures_per_epoch": int(train.repeats.sum()),
        "captions": len(np.unique(train.captions.rows)),
        "buckets": _buckets(train),
        "subsets": {
            rules.name: {
                "pictures": int((train.subsets == number).sum()),
                "held_out": int((held_out.subsets == number).sum()),
                "per_epoch": int(train.repeats[train.subsets == number].sum()),
                "loss_weight": rules.loss_weight,
                "caption_dropout_rate": rules.caption_dropout_rate,
            }
            for number, rules in enumerate(train.rules)
        },
    }


def _buckets(items: Items) -> dict[str, int]:
    """Returns how many rows to train on (crops and mirrored ones apart) have each size, in pixels."""
    sides = items.latent_shapes[items.latents.rows] * _PIXELS_PER_LATENT
    counts = Counter((int(width), int(height)) for height, width in sides)
    return {f"{width}x{height}": rows for (width, height), rows in sorted(counts.items())}
