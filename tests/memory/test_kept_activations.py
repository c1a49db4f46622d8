"""Whatever blocks keep for their backward pass, training ends in the same bits; and they keep what the model says."""

import pytest
import torch
from support.new_memory import NewMemory
from support.streaming_cases import PoisoningCopyStream, add_adapters, parameters, resident, train
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.memory.schedule import kept_activations
from sd3pipe.memory.sizes import Tokens, kept_bytes, model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.recomputation import ATTENTION_OPERATORS

DEPTH = 4
MIXTURES = [  # every number of blocks that keep all, and that keep attention's output, among recomputed ones
    *(kept_activations(DEPTH, all_kept=count, attention_kept=0) for count in range(1, DEPTH + 1)),
    *(kept_activations(DEPTH, all_kept=0, attention_kept=count) for count in range(1, DEPTH + 1)),
    kept_activations(DEPTH, all_kept=2, attention_kept=2),
    kept_activations(DEPTH, all_kept=1, attention_kept=2),
]


def _assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.long
@pytest.mark.parametrize("count", [None, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, DEPTH))])
@pytest.mark.parametrize(
    "variant",
    [
        "sd35-medium",
        pytest.param("sd3-medium", marks=pytest.mark.slow),
        pytest.param("sd35-large", marks=pytest.mark.slow),
    ],
)
def test_every_level_and_number_trains_the_same_bits(variant, count):
    adapters = ("attn.qkv", "mlp.fc2", "adaLN_modulation.1")
    expected = resident(variant, adapters=adapters, steps=1)
    for kept in MIXTURES:
        streaming = {} if count is None else {"stream": PoisoningCopyStream()}
        model = tiny_mmdit(variant, depth=DEPTH)
        _assert_same(train(model, adapters=adapters, blocks_to_swap=count, kept=kept, steps=1, **streaming), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "ahead"},
        {"offload_activations": True},
        pytest.param({"autocast": True}, marks=pytest.mark.slow),
        pytest.param({"modulation": "resident"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mixtures_go_with_the_other_ways_to_save_memory(options):
    expected = resident("sd35-medium", **{key: value for key, value in options.items() if key == "autocast"})
    for kept in (MIXTURES[3], MIXTURES[7], MIXTURES[9]):
        model, stream = tiny_mmdit("sd35-medium", depth=DEPTH), PoisoningCopyStream()
        _assert_same(train(model, blocks_to_swap=DEPTH, kept=kept, stream=stream, **options), expected)


@pytest.mark.long
def test_trained_embedders_get_their_gradient_through_modulation_that_is_kept():
    adapters = ("t_embedder.mlp.2", "context_embedder", "attn.proj", "adaLN_modulation.1")
    expected = resident("sd35-large", adapters=adapters)
    for kept in (MIXTURES[3], MIXTURES[7], MIXTURES[9]):
        model, stream = tiny_mmdit("sd35-large", depth=DEPTH), PoisoningCopyStream()
        _assert_same(train(model, adapters=adapters, blocks_to_swap=DEPTH, kept=kept, stream=stream), expected)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, DEPTH))])
def test_layer_major_order_gives_the_same_bits_with_every_mixture(count):
    batches = [random_inputs(seed=seed, batch=1 + seed % 2, height=4, width=6) for seed in range(3)]
    results = []
    for kept in (("none",) * DEPTH, *MIXTURES):
        model = tiny_mmdit("sd35-medium", depth=DEPTH)
        layers = add_adapters(model, ["attn.qkv", "mlp.fc1", "adaLN_modulation.1", "t_embedder.mlp.2"])
        model.keep_activations(kept)
        with BlockStreamer(model, blocks_to_swap=count, device="cpu", stream=PoisoningCopyStream()) as streamer:
            losses = run_layer_major(model, streamer, batches, lambda _, velocity: velocity.square().mean() / 3)
        results.append(dict(enumerate(losses)) | {name: p.grad for name, p in parameters(layers)})
    for found in results[1:]:
        _assert_same(found, results[0])


RANK, IMAGE, TEXT = 2, 192, 64  # many tokens, beside which a picture's modulation vectors are nothing


def _block_and_inputs(variant, index):
    model = tiny_mmdit(variant)
    network = attach(model, AdapterSpec(rank=RANK))
    width = model.architecture.width
    streams = [torch.randn(1, length, width).requires_grad_() for length in (TEXT, IMAGE)]
    with torch.no_grad():
        vectors = model.joint_blocks[index].modulation(torch.randn(1, width))
    size = model_size(model.architecture.shapes())
    tokens = Tokens(width=width, image=IMAGE, text=TEXT, dtype_bytes=4, rank=RANK, qk_norm=size.qk_norm)
    inputs = (*streams, *(vector.requires_grad_() for vector in vectors))
    return model.joint_blocks[index], size.blocks[index], inputs, tokens, network


@pytest.mark.parametrize(
    "variant, index", [("sd3-medium", 0), ("sd3-medium", 2), ("sd35-medium", 0), ("sd35-large", 0), ("sd35-large", 2)]
)
def test_saved_tensors_are_as_many_bytes_as_the_model_says(variant, index):
    block, size, inputs, tokens, network = _block_and_inputs(variant, index)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs)
    for tensor in (*block.parameters(), *network.parameters(), *inputs[2:]):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert kept_bytes(size, tokens, "all") == pytest.approx(sum(saved.values()), rel=0.02)


@pytest.mark.parametrize("kept", ["none", "attention", "all"])
@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_a_block_keeps_as_many_bytes_as_the_model_says(variant, kept):
    """All memory that outlives the forward pass is counted, however torch holds on to it."""
    block, size, inputs, tokens, network = _block_and_inputs(variant, 0)
    block.kept = kept
    with NewMemory([*block.parameters(), *network.parameters(), *inputs]) as memory:
        outputs = block.run(*inputs)
    of_outputs = sum(tensor.nbytes for tensor in outputs)  # which are the next block's inputs
    found = memory.bytes() - of_outputs + tokens.input_bytes
    assert kept_bytes(size, tokens, kept) == pytest.approx(found, rel=0.02)


@pytest.mark.slow  # compiling takes half a minute each time
@pytest.mark.parametrize("count", [0, DEPTH])
def test_compiled_mixtures_stay_near_the_interpreted_ones(count):
    expected = resident("sd35-large", steps=1)
    torch._dynamo.reset()
    model = tiny_mmdit("sd35-large", depth=DEPTH)
    for block in model.joint_blocks:
        block.compile(fullgraph=True)
    found = train(model, blocks_to_swap=count, kept=("none", "attention", "all", "attention"), steps=1)
    for name, tensor in expected.items():
        if not name.startswith("weight"):  # AdamW divides by the gradient's size, so it magnifies rounding of zeros
            # kernels that are fused round once where single ones round several times
            torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def test_every_attention_operator_of_torch_is_kept():
    ours = {operator.name() for operator in ATTENTION_OPERATORS}
    names = {name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product_")}
    forward = {f"aten::{name}" for name in names if not name.endswith("_backward")}
    assert {name.split(".")[0] for name in ours} >= forward - {"aten::_scaled_dot_product_attention_math"}


def test_kept_levels_are_spread_evenly():
    assert kept_activations(6, all_kept=0, attention_kept=0) == ("none",) * 6
    assert kept_activations(6, all_kept=6, attention_kept=0) == ("all",) * 6
    assert kept_activations(6, all_kept=3, attention_kept=0) == ("all", "none") * 3
    assert kept_activations(6, all_kept=0, attention_kept=3) == ("none", "attention") * 3
    assert sorted(kept_activations(38, all_kept=10, attention_kept=20)).count("none") == 8
