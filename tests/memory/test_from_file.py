"""Blocks that are read from the file in every step train the same bits, in the planned order of reads."""

import pytest
import torch
from support.streaming_cases import (
    PoisoningCopyStream,
    add_adapters,
    log_copies,
    log_reads,
    parameters,
    resident,
    train,
)
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.errors import InputError, ParameterError
from sd3pipe.memory.from_file import WeightsFile
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.memory.schedule import STAGING_BUFFERS, step_copies
from sd3pipe.memory.streaming import BlockStreamer

DEPTH = 8


def _file(model, blocks):
    """The weights of a model as they are now, as if they were in a file."""
    stored = {name: parameter.detach().clone() for name, parameter in model.joint_blocks.named_parameters()}

    def read(index, name, destination):
        destination.copy_(stored[f"{index}.{name}"])

    return WeightsFile(blocks=blocks, dtype=torch.float32, read=read)


@pytest.mark.parametrize("kept", ["none", pytest.param("attention", marks=pytest.mark.slow), "all"])
@pytest.mark.parametrize("streamed, from_file", [(4, 1), (4, 4), (3, 2)])
def test_training_from_the_file_gives_the_same_bits(streamed, from_file, kept):
    depth = 4
    model, stream = tiny_mmdit("sd35-medium", depth=depth), PoisoningCopyStream()
    file = _file(model, from_file)
    found = train(model, blocks_to_swap=streamed, file=file, kept=[kept] * depth, stream=stream)
    assert all(torch.equal(tensor, found[name]) for name, tensor in resident("sd35-medium").items())


@pytest.mark.long
def test_layer_major_order_reads_the_file_once_for_all_micro_batches():
    batches = [random_inputs(seed=seed, batch=1, height=4, width=6) for seed in range(3)]
    gradients, read = [], []
    for from_file in (0, 4):
        model = tiny_mmdit("sd35-large", depth=4)
        file = _file(model, from_file)
        model.keep_activations(["none"] * 4)
        layers = add_adapters(model, ["attn.qkv"])
        with BlockStreamer(
            model, blocks_to_swap=4, device="cpu", file=file, stream=PoisoningCopyStream()
        ) as streamer:  # fmt: skip
            staging = streamer.rings.staging
            read.append(log_reads(staging) if staging else log_copies(streamer.rings))
            run_layer_major(model, streamer, batches, lambda _, velocity: velocity.square().mean() / 3)
        gradients.append([p.grad for _, p in parameters(layers)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert read[1][: len(read[0])] == read[0]


@pytest.mark.long
@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium", "sd35-large"])
@pytest.mark.parametrize("from_file", [3, pytest.param(DEPTH, marks=pytest.mark.slow)])
def test_reads_are_the_planned_ones_and_ahead_of_the_copies(variant, from_file):
    model = tiny_mmdit(variant, depth=DEPTH)
    file = _file(model, from_file)
    add_adapters(model, ["x_block.attn.qkv"])
    stream = PoisoningCopyStream()
    with BlockStreamer(model, blocks_to_swap=DEPTH, device="cpu", file=file, stream=stream) as streamer:
        reads, copies = log_reads(streamer.rings.staging), log_copies(streamer.rings)
        for _ in range(3):
            model(**random_inputs(batch=1, height=4, width=4)).sum().backward()
        rings, numbers = [sorted(ring.blocks) for ring in streamer.rings.rings], set(streamer.from_file)
    planned = step_copies(rings, modulation="stream", first=True)
    for _ in range(2):
        planned += step_copies(rings, modulation="stream")
    planned = [copy for copy in planned if copy.block in numbers]
    assert len(numbers) == from_file
    assert reads[: len(planned)] == planned
    copied = [copy for copy in copies if copy.block in numbers]
    assert reads[: len(copied)] == copied
    assert len(reads) - len(copied) < STAGING_BUFFERS


@pytest.mark.long
def test_a_read_runs_ahead_of_its_copy():
    model = tiny_mmdit("sd35-large", depth=DEPTH)
    file = _file(model, DEPTH)
    with BlockStreamer(model, blocks_to_swap=DEPTH, device="cpu", file=file) as streamer, torch.no_grad():
        reads, seen = log_reads(streamer.rings.staging), []
        for block in model.joint_blocks:
            block.register_forward_pre_hook(lambda *_: seen.append(reads[-1].block))
        model(**random_inputs())
    assert seen[:4] == [3, 4, 5, 6]  # of block 0, slots hold 0 and 1; 2 and 3 are read


def test_weights_are_nowhere_but_in_the_file_and_the_slots():
    model = tiny_mmdit("sd35-large", depth=4)
    file = _file(model, 2)
    with BlockStreamer(model, blocks_to_swap=4, device="cpu", file=file) as streamer:
        model(**random_inputs()).sum()
        for index in range(4):
            away = all(p.isnan().all() for p in model.joint_blocks[index].parameters())
            assert away == (index in streamer.from_file)
        one = sum(p.numel() * 4 for p in model.joint_blocks[0].parameters())
        assert 2 * 0.9 * one < streamer.host_bytes < 2.1 * one


def test_a_file_that_cannot_be_read_any_more_ends_the_step():
    def read(index, name, destination):
        raise InputError("model.safetensors: ends early")

    model = tiny_mmdit("sd35-large", depth=4)
    file = WeightsFile(blocks=2, dtype=torch.float32, read=read)
    with (
        BlockStreamer(model, blocks_to_swap=4, device="cpu", file=file),
        pytest.raises(InputError, match="ends early"),
    ):
        model(**random_inputs())


def test_modulation_that_is_kept_elsewhere_is_refused():
    model = tiny_mmdit("sd35-large", depth=4)
    with pytest.raises(ParameterError, match="--host-memory needs stream"):
        BlockStreamer(model, blocks_to_swap=4, device="cpu", file=_file(model, 1), modulation="resident")
