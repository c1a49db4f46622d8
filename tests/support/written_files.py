"""A whole checkpoint as the base of exports, and the metadata of a trained adapter."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd3pipe.adapters.metadata import Provenance, training_metadata
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.rules.description import Description
from support.tiny_mmdit import random_weights, tiny_architecture
from support.tiny_parts import PREFIXES

_OF_A_BASE = {"modelspec.title": "base", "modelspec.author": "Ada", "modelspec.hash_sha256": "0x1"}


def single_file(path, variant, dtype=torch.float32, prefix=PREFIXES["mmdit"]):
    """A checkpoint with MMDiT and something else, in an order that is not that of the names."""
    mmdit = {prefix + key: tensor.to(dtype) for key, tensor in random_weights(tiny_architecture(variant)).items()}
    other = {f"first_stage_model.{name}": torch.randn(7, 3) for name in ("b", "a")}
    save_file(other | mmdit, path, metadata=_OF_A_BASE)
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def trained_metadata(step=20, **shape):
    made_from = Provenance(
        format=1, version="0.1.0", step=step, seed=42, fingerprints={"mmdit": "ab" * 32}, versions={"torch": "2.13.0"},
        parameters={"train": {"network_dim": 4, "learning_rate": 1e-4}},
    )  # fmt: skip
    return training_metadata(
        variant="sd35-medium",
        spec=AdapterSpec(**{"rank": 4, "alpha": 2.0, "part_ranks": {"x_mlp": 8}} | shape),
        options={"seed": 42, "apply_t5_attn_mask": False, "t5xxl_max_token_length": 154},
        step=step,
        epoch=2,
        output_name="cat",
        resolution=(1024, 768),
        provenance=made_from,
        description=Description(),
        dataset={"dataset_dirs": {"cats": {"n_repeats": 10, "img_count": 3}}},
    )
