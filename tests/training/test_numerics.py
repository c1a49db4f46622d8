"""Which kernel computes the attention is the user's choice."""

import pytest
import torch
from support.tiny_training import make_inputs, pictures

from sd3pipe.errors import ParameterError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(
        tmp_path_factory.mktemp("numerics"), pictures(1), max_train_steps=1, save_every_n_steps=None, resume="never"
    )


@pytest.fixture(autouse=True)
def kernels_as_before():
    yield
    for enable in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)


@pytest.mark.long
def test_the_attention_kernel_can_be_chosen(inputs):
    """The CPU has two: flash, which auto takes, and math."""
    quickest, flash, math = (inputs.train(name, sdpa_backend=name).losses() for name in ("auto", "flash", "math"))
    assert flash == quickest
    assert math == pytest.approx(quickest, rel=1e-5)
    assert not torch.backends.cuda.flash_sdp_enabled()


def test_a_kernel_that_the_device_lacks_is_refused(inputs):
    with pytest.raises(ParameterError, match="--sdpa-backend cudnn: torch has no such attention kernel"):
        inputs.train("cudnn", sdpa_backend="cudnn")
