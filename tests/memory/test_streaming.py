"""Streamed training is resident training, bit for bit; no stale slot is read; the copies are the planned ones."""

import itertools

import pytest
import torch
from support.streaming_cases import PoisoningCopyStream, add_adapters, log_copies, parameters, resident, train
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.errors import ParameterError
from sd3pipe.memory.quantise import quantise
from sd3pipe.memory.schedule import Copy, spread_evenly, step_copies
from sd3pipe.memory.streaming import BlockStreamer

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
DEPTH = 4


def _assert_same(results, others):
    assert len(results) == len(others) > 0
    for (name, tensor), (other_name, other) in zip(results.items(), others.items(), strict=True):
        assert name == other_name
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    "variant, modulation",
    [
        ("sd35-medium", "stream"),
        ("sd35-medium", "resident"),
        ("sd35-medium", "ahead"),
        ("sd3-medium", "stream"),
        ("sd35-large", "ahead"),
        pytest.param("sd3-medium", "resident", marks=pytest.mark.slow),
        pytest.param("sd3-medium", "ahead", marks=pytest.mark.slow),
        pytest.param("sd35-large", "stream", marks=pytest.mark.slow),
        pytest.param("sd35-large", "resident", marks=pytest.mark.slow),
    ],
)
def test_streamed_training_equals_resident_training_bit_for_bit(variant, modulation):
    for count in range(1, DEPTH + 1):
        stream = PoisoningCopyStream()
        streamed = train(tiny_mmdit(variant, depth=DEPTH), blocks_to_swap=count, modulation=modulation, stream=stream)
        _assert_same(streamed, resident(variant))
        assert stream.copies


@pytest.mark.long
@pytest.mark.parametrize("adapters", [("mlp.fc1",), ("adaLN_modulation.1",), ("adaLN_modulation.1", "attn.qkv")])
def test_any_set_of_adapted_layers_gets_the_same_gradients(adapters):
    expected = resident("sd35-medium", adapters=adapters)
    for modulation in ("stream", "resident", "ahead"):
        model = tiny_mmdit("sd35-medium", depth=DEPTH)
        _assert_same(train(model, adapters=adapters, blocks_to_swap=DEPTH, modulation=modulation), expected)


@pytest.mark.long
def test_adapted_embedders_get_their_gradient_through_streamed_modulation():
    adapters = ("t_embedder.mlp.2", "context_embedder", "attn.proj")
    for modulation in ("stream", "resident"):
        model = tiny_mmdit("sd35-large", depth=DEPTH)
        stream = PoisoningCopyStream()
        _assert_same(
            train(model, adapters=adapters, blocks_to_swap=DEPTH, modulation=modulation, stream=stream),
            resident("sd35-large", adapters=adapters),
        )
    with pytest.raises(ParameterError, match="modulation = ahead computes without the adapters"):
        train(tiny_mmdit("sd35-large", depth=DEPTH), adapters=adapters, blocks_to_swap=2, modulation="ahead")


@pytest.mark.long
def test_autocast_and_bf16_stream_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for count, modulation in ((0, "stream"), (2, "stream"), (2, "ahead")):
            model = tiny_mmdit("sd35-medium", depth=3, dtype=dtype)  # many processors have no quick products in bf16
            runs.append(train(model, blocks_to_swap=count, modulation=modulation, autocast=True, steps=1))
        _assert_same(runs[1], runs[0])
        _assert_same(runs[2], runs[0])


@pytest.mark.slow  # compiling takes 7 s each time
@pytest.mark.parametrize("base_format", [None, "fp8", "nf4"])
def test_compiled_blocks_stream_bit_for_bit_and_are_recomputed_within_one_graph(base_format):
    results = []
    for streaming in ({"blocks_to_swap": 0}, {"blocks_to_swap": DEPTH, "stream": PoisoningCopyStream()}):
        torch._dynamo.reset()
        model = tiny_mmdit("sd35-medium", depth=DEPTH)
        if base_format is not None:
            quantise(model, base_format)
        for block in model.joint_blocks:
            block.compile(backend="aot_eager", fullgraph=True)  # a break would raise
        results.append(train(model, adapters=("attn.qkv", "mlp.fc2"), **streaming))
    _assert_same(*results)


@pytest.mark.long
def test_offloaded_activations_come_back_unchanged():
    for count in (0, 3, DEPTH):
        model = tiny_mmdit("sd35-medium", depth=DEPTH)
        _assert_same(train(model, blocks_to_swap=count, offload_activations=True), resident("sd35-medium"))


def test_every_block_s_streams_leave_and_their_buffers_are_used_again():
    model = tiny_mmdit("sd35-medium", depth=DEPTH)
    add_adapters(model, ["context_embedder"])  # so that every block's context and x are saved
    model.keep_activations(("none",) * DEPTH)
    inputs = random_inputs(batch=2, height=8, width=8, tokens=10)
    with BlockStreamer(model, blocks_to_swap=DEPTH, device="cpu", offload_activations=True) as streamer:
        velocity = model(**inputs)
        streams = DEPTH * 2 * (10 + 16) * model.architecture.width * 4
        assert streamer.activations.bytes_out == streams
        velocity.sum().backward()
        model(**inputs).sum().backward()
        assert streamer.activations.bytes_out == 2 * streams
        assert streamer.activations.host_bytes == streams  # the second step uses the first one's buffers


@pytest.mark.long
@pytest.mark.parametrize("count", [8, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("modulation", ["stream", "resident"])
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name == "sd35-medium" else [pytest.mark.slow]) for name in VARIANTS]
)
def test_copies_are_the_planned_ones(variant, modulation, count):
    model, stream = tiny_mmdit(variant, depth=8), PoisoningCopyStream()
    add_adapters(model, ["x_block.attn.qkv"])  # in every block, so that every block has a backward pass
    with BlockStreamer(model, blocks_to_swap=count, modulation=modulation, device="cpu", stream=stream) as streamer:
        found = log_copies(streamer.rings)
        for _ in range(3):
            model(**random_inputs(batch=1, height=4, width=4)).sum().backward()
        rings = [sorted(ring.blocks) for ring in streamer.rings.rings]
    assert sorted(itertools.chain(*rings)) == list(spread_evenly(count, 8))
    assert len(rings) == {"sd3-medium": 2, "sd35-medium": 3, "sd35-large": 2}[variant]
    planned = step_copies(rings, modulation=modulation, first=True)
    for _ in range(2):
        planned += step_copies(rings, modulation=modulation)
    ahead = found[len(planned) :]  # the next step's first copies have begun
    assert found[: len(planned)] == planned
    assert ahead == step_copies(rings, modulation=modulation)[: len(ahead)]
    assert len(ahead) <= 2


@pytest.mark.long
def test_backward_never_fetches_modulation():
    model = tiny_mmdit("sd35-large", depth=8)
    add_adapters(model, ["adaLN_modulation.1", "attn.qkv"])
    with BlockStreamer(model, blocks_to_swap=8, device="cpu") as streamer:
        velocity = model(**random_inputs())
        fetched = log_copies(streamer.rings)
        velocity.sum().backward()
    assert [copy for copy in fetched if copy.part == "body"]
    wrapped = [copy for copy in fetched if copy.part != "body"]
    assert wrapped == [Copy(0, "modulation"), Copy(1, "modulation")]  # the next step's, ahead of it


def test_sampling_and_skipped_blocks_work_between_steps():
    model = tiny_mmdit("sd35-medium", depth=DEPTH)
    inputs = random_inputs()
    expected = [model(**inputs), model(**inputs, skip_blocks=[1, 2])]
    add_adapters(model, ["attn.qkv"], scale=0.0)
    with BlockStreamer(model, blocks_to_swap=4, device="cpu", stream=PoisoningCopyStream()):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(**inputs), expected[0])
                assert torch.equal(model(**inputs, skip_blocks=[1, 2]), expected[1])
            model(**inputs).sum().backward()


def test_two_graphs_at_once_and_a_dropped_graph_are_right():
    gradients = []
    for count in (0, DEPTH):
        model = tiny_mmdit("sd35-large", depth=DEPTH)
        model.keep_activations(["none"] * model.architecture.depth)
        layers = add_adapters(model, ["attn.qkv", "mlp.fc2"])
        with BlockStreamer(model, blocks_to_swap=count, device="cpu", stream=PoisoningCopyStream()):
            model(**random_inputs(seed=5))  # never asked for gradients
            first, second = model(**random_inputs(seed=2)), model(**random_inputs(seed=3))
            (first.square().sum() + second.square().sum()).backward()
        gradients.append({name: p.grad for name, p in parameters(layers)})
    _assert_same(*gradients)


def test_weights_are_back_and_unchanged_after_training():
    model = tiny_mmdit("sd35-medium", depth=DEPTH)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train(model, blocks_to_swap=DEPTH, stream=PoisoningCopyStream())
    _assert_same(dict(model.state_dict()), before)
    assert model.block_runner is None


def test_a_streamed_block_is_one_aligned_buffer():
    model = tiny_mmdit("sd35-medium", depth=DEPTH)
    with BlockStreamer(model, blocks_to_swap=DEPTH, device="cpu"):
        for block in model.joint_blocks:
            storages = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
            assert len(storages) == 1
            assert all(p.storage_offset() * p.element_size() % 256 == 0 for p in block.parameters())


@pytest.mark.long
def test_ring_memory_is_two_blocks_per_shape():
    model = tiny_mmdit("sd35-large", depth=8)
    with BlockStreamer(model, blocks_to_swap=8, device="cpu", modulation="resident") as streamer:
        body = sum(p.numel() * 4 for name, p in model.joint_blocks[0].named_parameters() if "adaLN" not in name)
        last = sum(p.numel() * 4 for name, p in model.joint_blocks[7].named_parameters() if "adaLN" not in name)
        assert 0 <= streamer.rings.bytes() - (2 * body + last) < 3 * 256 * 40  # alignment of at most 40 tensors a block


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(ParameterError, match="--blocks-to-swap 9: the model has 3 blocks: use 0 to 3"):
        BlockStreamer(tiny_mmdit("sd3-medium"), blocks_to_swap=9, device="cpu")


def test_streamed_blocks_are_spread_evenly():
    assert spread_evenly(0, 38) == ()
    assert spread_evenly(38, 38) == tuple(range(38))
    assert spread_evenly(4, 24) == (3, 9, 15, 21)
    for count in range(1, 25):
        chosen = spread_evenly(count, 24)
        gaps = {b - a for a, b in itertools.pairwise(chosen)}
        assert len(set(chosen)) == count
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
