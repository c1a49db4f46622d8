"""What train expects of a card, and what it says when a card is too small."""

from dataclasses import replace

import pytest
import torch
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd3pipe.diffusion.base_model import fewest_to_sample
from sd3pipe.errors import DeviceMemoryError
from sd3pipe.memory.choosing import Freedom
from sd3pipe.memory.plan import Rates, Settings, Workload, predict
from sd3pipe.memory.sizes import model_size
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.training.compiling import compile_blocks
from sd3pipe.training.memory_plan import choose, plan_memory
from sd3pipe.training.rates import measure_rates, measure_reading

LARGE = MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True)
WORK = Workload(image_tokens=4096, adapter_weights=24_000_000)
CARD = Rates(flop_per_second=60e12, copy_bytes_per_second=25e9)
CPU = torch.device("cpu")


def test_auto_takes_the_fewest_blocks_that_fit_and_says_so(caplog):
    caplog.set_level("INFO")
    plan = choose(LARGE, WORK, Settings(), device_bytes=12 * 10**9, rates=CARD)
    assert 0 < plan.settings.blocks_to_swap < 38
    assert plan.prediction.device_bytes <= 12 * 10**9
    assert f"--blocks-to-swap {plan.settings.blocks_to_swap}" in caplog.text
    assert choose(LARGE, WORK, Settings(), device_bytes=40 * 10**9, rates=CARD).settings.blocks_to_swap == 0


def test_auto_keeps_the_modulation_that_was_asked_for():
    plan = choose(LARGE, WORK, Settings(), Freedom(modes=("ahead",)), device_bytes=8 * 10**9, rates=CARD)
    assert plan.settings.modulation == "ahead"


def test_nothing_that_fits_is_an_error_with_a_way_out():
    with pytest.raises(DeviceMemoryError, match=r"no number of streamed blocks fits 1 GB .* lower resolution"):
        choose(LARGE, WORK, Settings(), device_bytes=10**9, rates=CARD)


def test_drawing_streams_as_few_blocks_as_it_must():
    counts = [
        fewest_to_sample(LARGE, tokens=4096, dtype=torch.bfloat16, device_bytes=gigabytes * 10**9)
        for gigabytes in (24, 16, 12, 8, 6)
    ]
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] < counts[4] <= 38
    with pytest.raises(DeviceMemoryError, match="1 GB of free device memory are too little to draw in"):
        fewest_to_sample(LARGE, tokens=4096, dtype=torch.bfloat16, device_bytes=10**9)


@pytest.mark.long
def test_auto_knows_the_hosts_memory():
    plan = choose(LARGE, WORK, Settings(), device_bytes=12 * 10**9, host_limit=32 * 10**9, rates=CARD)
    assert plan.prediction.host_bytes <= 32 * 10**9
    assert plan.settings.file_blocks == 0
    with pytest.raises(DeviceMemoryError, match=r"and 2.5 GB of host memory: .*--base-dtype nf4"):
        choose(LARGE, WORK, Settings(), device_bytes=12 * 10**9, host_limit=25 * 10**8, rates=CARD)


def test_what_the_host_does_not_hold_is_read_from_the_file_and_told(caplog):
    caplog.set_level("INFO")
    plan = choose(LARGE, WORK, Settings(), device_bytes=8 * 10**9, host_limit=8 * 10**9, rates=CARD)
    assert plan.prediction.host_bytes <= 8 * 10**9
    files, swapped = plan.settings.file_blocks, plan.settings.blocks_to_swap
    assert 0 < files <= swapped
    assert f"{files} of {swapped} swapped blocks are read from the file" in caplog.text


def test_a_slow_disk_is_streamed_from_as_little_as_fits():
    slow = replace(CARD, read_bytes_per_second=1e8)
    options = {"device_bytes": 8 * 10**9, "host_limit": 8 * 10**9}
    quick, late = (choose(LARGE, WORK, Settings(), **options, rates=rates) for rates in (CARD, slow))
    assert late.prediction.seconds > 2 * quick.prediction.seconds  # and prediction says so
    assert late.settings.file_blocks <= quick.settings.file_blocks


def test_the_disk_is_measured(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 20))
    assert 1e6 < measure_reading([file]) < 1e12


def test_a_host_that_is_too_small_is_told_of(caplog, monkeypatch):
    monkeypatch.setattr("sd3pipe.training.memory_plan.share_of_memory", lambda: 8 * 10**9)
    fixed = Freedom(blocks=False)
    plan_memory(LARGE, WORK, Settings(blocks_to_swap=38), fixed, device=CPU, dtype=torch.bfloat16)
    assert "of host memory, and 8 GB are left: stream fewer blocks, pack the base" in caplog.text


def test_without_cuda_settings_stay_as_wanted():
    wanted = Settings(blocks_to_swap=2)
    plan = plan_memory(tiny_architecture("sd3-medium"), WORK, wanted, Freedom(), device=CPU, dtype=torch.float32)
    assert plan.settings == wanted
    assert plan.rates is None


@pytest.mark.parametrize("host_bytes, kept", [(64 * 10**9, 3), (10**6, 0), (None, 0)])
def test_on_the_cpu_activations_are_kept_as_far_as_half_of_the_free_memory_goes(host_bytes, kept, monkeypatch):
    monkeypatch.setattr("sd3pipe.training.memory_plan.share_of_memory", lambda: host_bytes)
    freedom = Freedom(kept=True)
    plan = plan_memory(tiny_architecture("sd3-medium"), WORK, Settings(), freedom, device=CPU, dtype=torch.float32)
    assert (plan.settings.all_kept_blocks, plan.settings.blocks_to_swap) == (kept, 0)


def test_on_the_cpu_all_is_predicted_of_the_hosts_memory(monkeypatch, caplog):
    monkeypatch.setattr("sd3pipe.training.memory_plan.share_of_memory", lambda: 8 * 10**9)
    plan = plan_memory(LARGE, WORK, Settings(), Freedom(), device=CPU, dtype=torch.bfloat16)
    on_a_card = predict(model_size(LARGE.shapes()), WORK, Settings())
    assert plan.prediction.tensor_bytes == 0
    assert plan.prediction.host_bytes == on_a_card.host_bytes + on_a_card.tensor_bytes
    assert "this run needs about" in caplog.text and "8 GB are left" in caplog.text


def test_rates_are_measured_at_the_size_of_the_run():
    architecture = tiny_architecture("sd35-medium")
    rates = measure_rates(architecture, Workload(image_tokens=64, text_tokens=20), device=CPU, dtype=torch.float32)
    assert 1e7 < rates.flop_per_second < 1e14
    assert 1e7 < rates.copy_bytes_per_second < 1e13


@pytest.mark.parametrize("dual_blocks", [(), (0, 1, 2)])
def test_the_speed_is_by_the_operations_of_the_block_that_is_timed(monkeypatch, dual_blocks):
    """Of SD3.5-medium that has a second attention, which half of the model's blocks do not have."""

    def as_many_seconds_as_operations(action, device):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            action()
        return max(1, counter.get_total_flops())

    monkeypatch.setattr("sd3pipe.training.rates._seconds", as_many_seconds_as_operations)
    architecture = replace(tiny_architecture("sd35-medium", depth=4), dual_attention_blocks=dual_blocks)
    rates = measure_rates(architecture, Workload(image_tokens=64, text_tokens=20), device=CPU, dtype=torch.float32)
    assert rates.flop_per_second == pytest.approx(1.0, rel=0.02)


def test_the_report_has_prediction_beside_truth():
    plan = choose(LARGE, WORK, Settings(), device_bytes=12 * 10**9, rates=CARD)
    report = plan.as_report(peak_device_bytes=11, seconds_per_step=2.5, copied_bytes_per_step=7)
    assert report["device_bytes"] == {"predicted": plan.prediction.tensor_bytes, "measured": 11}
    assert report["copied_bytes_per_step"] == {"predicted": plan.prediction.copied_bytes, "measured": 7}
    assert report["host_bytes"]["predicted"] == plan.prediction.host_bytes
    assert report["host_bytes"]["measured"] > 0
    assert report["seconds_per_step"]["measured"] == 2.5
    assert report["blocks_to_swap"] == plan.settings.blocks_to_swap
    assert (report["recomputed_blocks"], report["attention_kept_blocks"]) == (38, 0)


@pytest.mark.slow
def test_compiled_blocks_stream_and_give_the_same_numbers():
    from sd3pipe.memory.streaming import BlockStreamer

    inputs = random_inputs()
    expected = tiny_mmdit("sd35-medium")(**inputs)
    model = tiny_mmdit("sd35-medium")
    compile_blocks(model, backend="aot_eager")
    with BlockStreamer(model, blocks_to_swap=2, device="cpu"):
        for _ in range(2):
            torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)  # fused sums are reordered
