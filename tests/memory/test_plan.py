"""The cost model: formulas, bytes against a real model's, what fits, and what it says when nothing does."""

import subprocess
import sys
from dataclasses import replace

import pytest
from support.streaming_cases import add_adapters
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.memory.choosing import Freedom, Limits, advice, alternatives, fitting_settings
from sd3pipe.memory.plan import Rates, Settings, Workload, option_text, predict
from sd3pipe.memory.quantise import quantise
from sd3pipe.memory.sizes import image_tokens, model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.architecture import MMDiTArchitecture

MEDIUM = model_size(
    MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))).shapes()
)
LARGE = model_size(MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True).shapes())
WORK = Workload(image_tokens=4096)
CARD = Rates(flop_per_second=60e12, copy_bytes_per_second=25e9)  # an RTX 3090, as streaming-math assumes it


@pytest.mark.parametrize(
    "model, px, forward, backward",
    [(LARGE, 1024, 31.1, 73.1), (LARGE, 512, 8.0, 17.0), (MEDIUM, 1024, 11.2, 28.8), (MEDIUM, 512, 2.4, 5.4)],
)
def test_operations_are_those_of_the_sums(model, px, forward, backward):
    tokens = (1, image_tokens(px, px), 333)
    # The sums were rounded to a digit, and leave out what the last block does not have.
    assert model.forward_flop(*tokens) / 1e12 == pytest.approx(forward, abs=0.11)
    assert model.backward_flop(*tokens, kept=["none"] * model.depth) / 1e12 == pytest.approx(backward, abs=0.15)


def test_block_bytes_are_the_published_ones():
    assert LARGE.blocks[0].body_bytes(2, "dense") + LARGE.blocks[0].modulation_bytes(2) == 425_999_360
    assert MEDIUM.blocks[0].body_bytes(2, "dense") + MEDIUM.blocks[0].modulation_bytes(2) == 203_013_888
    assert (
        LARGE.outside * 2
        + LARGE.position_table * 2
        + sum(b.body_bytes(2, "dense") + b.modulation_bytes(2) for b in LARGE.blocks)
        == 16_292_561_536
    )


def test_streaming_is_free_where_copies_hide_behind_computing():
    everything = predict(LARGE, WORK, Settings(blocks_to_swap=38), CARD)
    nothing = predict(LARGE, WORK, Settings(), CARD)
    assert nothing.copied_bytes == 0
    assert nothing.seconds == nothing.compute_seconds == pytest.approx(1.738, abs=0.005)
    assert 1.0 < everything.seconds / nothing.seconds < 1.07  # 7 % in the sums, whose backward fetched adaLN, too
    quarter = Workload(image_tokens=1024)
    bound = predict(LARGE, quarter, Settings(blocks_to_swap=38), CARD)
    assert bound.seconds > 2 * bound.compute_seconds  # 512 px: the copies take longer than the products


def test_layer_major_copies_once_for_all_micro_batches():
    work = Workload(image_tokens=1024, accumulation=4)
    ordinary = predict(LARGE, work, Settings(blocks_to_swap=38), CARD)
    layer_major = predict(LARGE, work, Settings(blocks_to_swap=38, layer_major=True), CARD)
    assert ordinary.copied_bytes == 4 * layer_major.copied_bytes
    assert layer_major.seconds < ordinary.seconds


@pytest.mark.long
@pytest.mark.parametrize("modulation", ["stream", pytest.param("resident", marks=pytest.mark.slow)])
@pytest.mark.parametrize("base_format", ["dense", "fp8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_predicted_bytes_are_those_of_the_streamer(base_format, modulation):
    model = tiny_mmdit("sd35-medium", depth=8)  # rings of 4, 3 and 1 blocks
    size = model_size(tiny_architecture("sd35-medium", 8).shapes())
    if base_format != "dense":
        quantise(model, base_format)
    add_adapters(model, ["x_block.attn.qkv"])
    settings = Settings(blocks_to_swap=8, base_format=base_format, modulation=modulation, dtype_bytes=4)
    predicted = predict(size, Workload(image_tokens=4), settings)
    with BlockStreamer(model, blocks_to_swap=8, modulation=modulation, device="cpu") as streamer:
        alignment = 1.01  # each tensor begins at a multiple of 256 bytes
        assert predicted.device_parts["ring"] <= streamer.rings.bytes() < alignment * predicted.device_parts["ring"]
        host = predicted.host_parts["streamed blocks"]
        assert host <= streamer.host_bytes < alignment * host
        copied = []
        for _ in range(3):
            before = streamer.copied_bytes
            model(**random_inputs(batch=1, height=4, width=4)).sum().backward()
            copied.append(streamer.copied_bytes - before)
    assert predicted.copied_bytes <= copied[1] < alignment * predicted.copied_bytes
    assert copied[2] == copied[1]


def test_auto_streams_as_few_blocks_as_it_must():
    counts = []
    for gigabytes in (24, 16, 12, 8, 6):
        found = fitting_settings(LARGE, WORK, Settings(), Limits(device_bytes=gigabytes * 10**9))
        settings, prediction = found
        assert prediction.device_bytes <= gigabytes * 10**9
        counts.append(settings.blocks_to_swap)
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] > counts[1] > 0
    assert fitting_settings(LARGE, WORK, Settings(), Limits(device_bytes=10**9)) is None


def test_a_card_with_room_sends_no_activations_away():
    found = fitting_settings(LARGE, WORK, Settings(), Limits(device_bytes=24 * 10**9))
    assert found is not None
    assert option_text(found[0], 38) == "--blocks-to-swap 0 --gradient-checkpointing on"


def test_a_small_host_limits_what_can_be_streamed():
    for host_bytes, fits in ((32 * 10**9, True), (2 * 10**9, False)):
        limits = Limits(device_bytes=8 * 10**9, host_bytes=host_bytes)
        assert (fitting_settings(LARGE, WORK, Settings(), limits) is not None) == fits


def test_advice_names_settings_that_need_clearly_less():
    text = advice(LARGE, WORK, Settings(), Limits(device_bytes=12 * 10**9))
    assert text.startswith("--blocks-to-swap ")
    assert "should fit: about" in text
    tight = advice(LARGE, WORK, Settings(blocks_to_swap=38, activation_offload=True), Limits(device_bytes=3 * 10**9))
    assert "--base-dtype" in tight
    assert "at a lower resolution" in advice(LARGE, WORK, Settings(base_format="nf4"), Limits(device_bytes=10**9))
    many = Workload(image_tokens=4096, batch=8)
    assert "train_batch_size = 4" in advice(LARGE, many, Settings(base_format="nf4"), Limits(device_bytes=2 * 10**9))


def test_options_are_written_as_a_user_would():
    settings = Settings(blocks_to_swap=9, base_format="fp8", modulation="resident", activation_offload=True)
    text = option_text(settings, 38)
    assert text == (
        "--blocks-to-swap 9 --gradient-checkpointing on --base-dtype fp8 --modulation resident --activation-offload"
    )
    assert option_text(Settings(all_kept_blocks=38), 38) == "--blocks-to-swap 0 --gradient-checkpointing off"
    assert option_text(Settings(all_kept_blocks=30), 38) == "--blocks-to-swap 0 --gradient-checkpointing 8"
    text = option_text(Settings(all_kept_blocks=4, attention_kept_blocks=30), 38)
    assert text.endswith("--gradient-checkpointing auto (attention kept in 30 blocks, 4 recomputed, 4 kept whole)")


@pytest.mark.long
def test_more_memory_means_less_recomputation_and_quicker_steps():
    """By the sums, medium needs none of it on 24 GB, large none on 48 GB."""
    freedom, before = Freedom(kept=True), None
    for gigabytes in (6, 8, 12, 16, 24, 32, 48, 80):
        settings, prediction = fitting_settings(
            LARGE, WORK, Settings(), Limits(device_bytes=gigabytes * 10**9), rates=CARD, freedom=freedom
        )
        assert prediction.device_bytes <= gigabytes * 10**9
        assert before is None or prediction.seconds <= before
        before = prediction.seconds
        assert ((settings.all_kept_blocks, settings.blocks_to_swap) == (38, 0)) == (gigabytes >= 48), gigabytes
    limits = Limits(device_bytes=24 * 10**9)
    settings, _ = fitting_settings(MEDIUM, WORK, Settings(), limits, rates=CARD, freedom=freedom)
    assert (settings.all_kept_blocks, settings.blocks_to_swap) == (24, 0)


def test_what_is_kept_is_counted_in_memory_and_in_time():
    everything = predict(LARGE, WORK, Settings(all_kept_blocks=38), CARD)
    attention = predict(LARGE, WORK, Settings(attention_kept_blocks=38), CARD)
    nothing = predict(LARGE, WORK, Settings(), CARD)
    assert everything.device_bytes > attention.device_bytes > nothing.device_bytes
    assert everything.seconds < attention.seconds < nothing.seconds
    saved = nothing.operations - everything.operations
    assert saved == pytest.approx(LARGE.forward_flop(1, WORK.image_tokens, WORK.text_tokens))  # a third of the step
    assert nothing.device_parts["kept activations"] == everything.device_parts["one block computed again"] == 0
    # one width per token in 16 bit, and a float32 of each head, in each block but the one that is being differentiated
    one = (WORK.image_tokens + WORK.text_tokens) * (2432 * 2 + 38 * 4)
    assert attention.device_parts["kept activations"] == pytest.approx(38 * one, rel=0.03)


def test_a_pc_with_16_gb_trains_large_and_reads_the_rest_from_the_file():
    limits = Limits(device_bytes=8 * 10**9, host_bytes=16 * 10**9)
    settings, prediction = fitting_settings(LARGE, WORK, Settings(), limits, rates=CARD)
    assert prediction.host_bytes <= limits.host_bytes
    assert settings.file_blocks == 0  # 30 blocks are fewer than that
    limits = Limits(device_bytes=5 * 10**9, host_bytes=12 * 10**9)
    settings, prediction = fitting_settings(LARGE, WORK, Settings(), limits, rates=CARD)
    assert prediction.host_bytes <= limits.host_bytes
    assert settings.file_blocks > 0
    one_less = predict(LARGE, WORK, replace(settings, file_blocks=settings.file_blocks - 1))
    assert one_less.host_bytes > limits.host_bytes
    assert 0 < prediction.read_bytes < prediction.copied_bytes
    assert fitting_settings(LARGE, WORK, Settings(base_format="int8"), limits)[0].file_blocks == 0  # never packed ones


def test_what_the_user_fixes_stays():
    limits, wanted = Limits(device_bytes=24 * 10**9), Settings(blocks_to_swap=5, all_kept_blocks=3)
    settings, _ = fitting_settings(LARGE, WORK, wanted, limits, rates=CARD)
    assert settings.all_kept_blocks == 3
    freedom = Freedom(blocks=False, kept=True)
    settings, _ = fitting_settings(LARGE, WORK, wanted, limits, rates=CARD, freedom=freedom)
    assert settings.blocks_to_swap == 5
    assert settings.attention_kept_blocks > 0


@pytest.mark.long
def test_alternatives_need_clearly_less():
    limits, freedom = Limits(device_bytes=24 * 10**9), Freedom(kept=True)
    choice = fitting_settings(LARGE, WORK, Settings(), limits, rates=CARD, freedom=freedom)
    less_device, less_host = alternatives(LARGE, WORK, choice, limits, rates=CARD, freedom=freedom)
    assert less_device[1].device_bytes <= 0.75 * choice[1].device_bytes
    assert less_host[1].host_bytes <= 0.75 * choice[1].host_bytes
    assert less_host[1].device_bytes <= limits.device_bytes
    assert min(less_device[1].seconds, less_host[1].seconds) >= choice[1].seconds


@pytest.mark.long
def test_planning_imports_no_torch():
    code = "import sys, sd3pipe.memory.plan, sd3pipe.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
