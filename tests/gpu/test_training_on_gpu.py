"""Whole runs of `train` on a CUDA device: tiny, but with everything that a user's run has."""

import pytest
import torch
from support.tiny_training import Inputs, equal, make_inputs, pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
DEPTH = 6
FORMATS = {
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    **{name: {"base_dtype": name} for name in ("fp8", "int8", "nf4")},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """Two sizes of pictures, in batches of two; a promise of equal bits."""
    dataset = pictures(5, captions=("one", "two"), flips=True)
    folder = tmp_path_factory.mktemp("gpu")
    defaults = {"device": "auto", "deterministic": True, "train_batch_size": 2, "network_dropout": 0.2}
    yield make_inputs(folder, dataset, depth=DEPTH, **defaults)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("base_format", FORMATS)
def test_a_streamed_base_trains_as_a_resident_one(inputs, base_format):
    resident = inputs.train(f"{base_format}-resident", blocks_to_swap=0, **FORMATS[base_format])
    for count, offload in ((DEPTH // 2, False), (DEPTH, True)):
        options = {"blocks_to_swap": count, "activation_offload": offload, **FORMATS[base_format]}
        streamed = inputs.train(f"{base_format}-{count}", **options)
        assert streamed.losses() == resident.losses()
        assert equal(streamed.adapter(4), resident.adapter(4))
    assert streamed.report()["memory"]["copied_bytes_per_step"]["measured"] > 0


def test_a_resumed_run_ends_in_the_same_bits(inputs):
    options = {"blocks_to_swap": DEPTH, "output_name": "resumed"}
    inputs.train("resumed", max_train_steps=2, **options)
    resumed = inputs.train("resumed", max_train_steps=6, **options)
    whole = inputs.train("whole", max_train_steps=6, **options)
    assert resumed.losses() == whole.losses()
    assert equal(resumed.adapter(6), whole.adapter(6))
    assert equal(resumed.optimizer(6), whole.optimizer(6))


def test_layer_major_accumulation_ends_in_the_same_bits(inputs):
    options = {"gradient_accumulation_steps": 2, "blocks_to_swap": DEPTH, "output_name": "order"}
    ordinary = inputs.train("ordinary", **options)
    layer_major = inputs.train("layer-major", layer_major=True, **options)
    assert equal(layer_major.adapter(4), ordinary.adapter(4))
    copied = [run.report()["memory"]["copied_bytes_per_step"]["measured"] for run in (ordinary, layer_major)]
    assert copied[1] < 0.7 * copied[0]


def test_a_compiled_run_learns_the_same(inputs):
    options = {"deterministic": False, "max_train_steps": 3, "mixed_precision": "no", "tf32": False}
    torch.use_deterministic_algorithms(False)
    interpreted = inputs.train("interpreted", torch_compile=False, blocks_to_swap=0, **options)
    compiled = inputs.train("compiled", torch_compile=True, blocks_to_swap=DEPTH, **options)
    assert compiled.losses() == pytest.approx(interpreted.losses(), rel=1e-3)


def test_a_plain_run_chooses_its_own_settings_and_tells_prediction_and_truth(inputs):
    torch.use_deterministic_algorithms(False)
    report = inputs.train("plain", deterministic=False).report()
    assert report["memory"]["settings"]["blocks_to_swap"] == 0  # this fits every card
    for name in ("device_bytes", "host_bytes", "seconds_per_step"):
        assert all(report["memory"][name][kind] > 0 for kind in ("predicted", "measured"))
