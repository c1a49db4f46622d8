"""A whole model with an adapter in it: the base's own layout, predicting as base and adapter do."""

import json
import shutil

import pytest
import torch
from command_line import report_of, sd3pipe
from diffusers import SD3Transformer2DModel
from random_adapters import random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_mmdit import random_inputs, random_weights, tiny_architecture
from tiny_parts import PREFIXES, save_single_file, tiny_parts

from sd3pipe.adapters.files import save_adapter
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.models.checkpoint import load_mmdit

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]


def weights(variant, dtype):
    return {key: tensor.to(dtype) for key, tensor in random_weights(tiny_architecture(variant)).items()}


def export(tmp_path, model, adapter, out, *options, expect=0):
    save_adapter(tmp_path / "lora.safetensors", adapter)
    return sd3pipe("export", "--adapter", tmp_path / "lora.safetensors", "--format", "checkpoint", "--model", model,
                   "--out", out, *options, expect=expect)  # fmt: skip
