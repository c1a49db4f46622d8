"""What a saved adapter says of itself."""

import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from pydantic import JsonValue

from sd3pipe.adapters.metadata import Provenance, training_metadata
from sd3pipe.adapters.network import AdapterNetwork
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.console import version
from sd3pipe.params.train import TrainParams
from sd3pipe.training.adapter_options import adapter_spec
from sd3pipe.training.run import Run, TrainedModel
from sd3pipe.training.state_file import Progressed
from sd3pipe.training.training_data import TrainingData
from sd3pipe.words import Algorithm

_LIBRARIES = ("torch", "numpy", "safetensors")


def adapter_metadata(run: Run, model: TrainedModel, progressed: Progressed) -> Mapping[str, str]:
    """Returns the metadata of an adapter at the step at hand; no path, time or machine is in it."""
    params, data, inputs = run.params, run.data, run.inputs
    options: dict[str, JsonValue] = {
        **params.with_role("identity"),
        "mixed_precision": inputs.precision,
        "max_train_steps": inputs.total_steps,
        "gradient_accumulation_steps": inputs.micro_batches,
        "gradient_checkpointing": params.memory.gradient_checkpointing != "off",
        "training_comment": params.training_comment,
    }
    made_from = Provenance(
        format=1,
        version=version(),
        step=progressed.step,
        seed=params.seed,
        fingerprints={
            "mmdit": inputs.base,
            "latents": data.latents.manifest.index,
            "text": data.text.manifest.index,
            "dataset": str(data.identity()["training_rows"]),
            **data.fingerprints(),
        },
        parameters={
            "train": options,
            "encode-text": dict(data.text.manifest.recipe),
            "encode-latents": dict(data.latents.manifest.recipe),
        },
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
    return training_metadata(
        variant=model.objective.mmdit.architecture.variant,
        spec=_described_spec(params, model.objective.network),
        options=dict(data.text.manifest.recipe) | options,
        step=progressed.step,
        epoch=progressed.epochs_done,
        output_name=run.output_name,
        resolution=max(data.resolutions, key=lambda size: size[0] * size[1]),
        provenance=made_from,
        description=params.description,
        dataset={
            "sd_model_name": Path(params.mmdit or params.model).name,
            "tag_frequency": dict(data.text.manifest.tags) or None,
            **_pictures(data),
        },
    )


def _described_spec(params: TrainParams, network: AdapterNetwork) -> AdapterSpec:
    """Returns what the options say of the adapter, or with `dim_from_weights` what most of its layers are."""
    spec = adapter_spec(params.adapter, seed=params.seed)
    if not params.dim_from_weights:
        return spec
    shapes = Counter((delta.algorithm, delta.rank, delta.alpha) for delta in network.deltas().values())
    ((algorithm, rank, alpha), _), *_ = shapes.most_common(1)
    return replace(spec, algorithm=cast(Algorithm, algorithm), rank=rank, alpha=alpha)


def _pictures(data: TrainingData) -> dict[str, object]:
    """Returns what sd-scripts says of the pictures: those of each subset, and how many of all are seen in an epoch."""
    facts: dict[str, object] = {}
    for word, is_reg in (("", False), ("reg_", True)):
        numbers = [n for n, rules in enumerate(data.train.rules) if data.subsets[rules.name]["is_reg"] == is_reg]
        names = [data.train.rules[number].name for number in numbers]
        facts[f"{word}dataset_dirs"] = {
            name: {
                "n_repeats": data.subsets[name]["num_repeats"],
                "img_count": int((data.train.subsets == number).sum()),
            }
            for name, number in zip(names, numbers, strict=True)
        }
        seen = np.isin(data.train.subsets, numbers)
        facts[f"num_{word or 'train_'}images"] = int(data.train.repeats[seen].sum())
    return facts
