"""What a run trained on, in the numbers that a report shows."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, JsonValue, TypeAdapter

from sd3pipe.diffusion.sampler import PIXELS_PER_LATENT
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.training.items import Items
from sd3pipe.training.training_data import TrainingData


class _EncodeReport(BaseModel):
    """What an encode stage said of itself beside the cache that it filled."""

    exit_code: Literal[0]
    seconds: float
    captions: dict[str, JsonValue] = {}
    cut: list[JsonValue] = []


def encode_summary(caches: Mapping[str, Path]) -> dict[str, object]:
    """Returns, by cache, what its encode stage counted, as JSON types; nothing of a cache that came without a report.

    It belongs into the run's own report, because the cache may hold other captions when somebody reads that.
    """
    summary: dict[str, object] = {}
    for name, cache in caches.items():
        try:
            report = read_json(Path(f"{cache}.report.json"), TypeAdapter(_EncodeReport))
        except DocumentError:
            continue
        summary[name] = {"seconds": report.seconds, "captions": report.captions, "cut": len(report.cut)}
    return summary


def data_summary(data: TrainingData) -> dict[str, object]:
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
    sides = items.latent_shapes[items.latents.rows] * PIXELS_PER_LATENT
    counts = Counter((int(width), int(height)) for height, width in sides)
    return {f"{width}x{height}": rows for (width, height), rows in sorted(counts.items())}
