"""The base is read block by block into its final places, and computes what the plainly loaded model computes."""

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_mmdit import random_inputs, random_weights, tiny_architecture

from sd3pipe.diffusion.base_model import load_base
from sd3pipe.errors import ParameterError
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.quantise import quantise
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.models.sources import find_component

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "sd35m.safetensors"
    weights = random_weights(tiny_architecture("sd35-medium", depth=4))
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, file)
    return file


@pytest.mark.long
@pytest.mark.parametrize("format", [None, "fp8"])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_base_computes_what_the_plain_model_computes(base_file, count, format):
    plain, inputs = load_mmdit(base_file, dtype=torch.bfloat16), random_inputs()
    if format is not None:
        quantise(plain, format)
    source = find_component("mmdit", model=base_file)
    for modulation in ("stream", "resident", "ahead"):
        settings = Settings(base_format=format or "dense", blocks_to_swap=count, modulation=modulation)
        mmdit, streamer = load_base(source, dtype=torch.bfloat16, device=CPU, settings=settings)
        with streamer:
            assert torch.equal(mmdit(**inputs), plain(**inputs))
        assert not any(p.requires_grad or p.is_meta for p in mmdit.parameters())
        for name, tensor in plain.state_dict().items():
            assert torch.equal(mmdit.state_dict()[name], tensor), name


def test_too_many_blocks_are_refused(base_file):
    source = find_component("mmdit", model=base_file)
    with pytest.raises(ParameterError, match="--blocks-to-swap 5: the model has 4 blocks"):
        load_base(source, dtype=torch.float32, device=CPU, settings=Settings(blocks_to_swap=5))
