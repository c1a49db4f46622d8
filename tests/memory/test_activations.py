"""Activations on their way to the host and back, over streams that copy as late as they may and keep nothing alive."""

import pytest
import torch
from support.late_copy_stream import LateCopyStream
from support.streaming_cases import add_adapters, parameters
from support.tiny_mmdit import random_inputs, tiny_mmdit

from sd3pipe.memory.activations import ActivationStore
from sd3pipe.memory.streaming import BlockStreamer

CPU = torch.device("cpu")


def numbered(count, length=4):
    return [torch.full((1, length, 8), float(number)) for number in range(count)]


def late_store():
    return ActivationStore(CPU, out=LateCopyStream(), back=LateCopyStream())


def test_tensors_that_were_dropped_at_once_come_back():
    store = late_store()
    offloaded = [store.store(tensor) for tensor in numbered(9)]
    for number in reversed(range(9)):
        assert torch.equal(store.load(offloaded[number]), torch.full((1, 4, 8), float(number)))
        offloaded.pop()


def test_few_tensors_stay_on_the_device_while_they_leave():
    out = LateCopyStream()
    store = ActivationStore(CPU, out=out, back=LateCopyStream())
    offloaded = []
    for tensor in numbered(9):
        offloaded.append(store.store(tensor))
        assert sum(not copy.happened for copy in out.copies) <= 4
    assert not all(copy.happened for copy in out.copies)
    store.close()
    assert all(copy.happened for copy in out.copies)


def test_a_dropped_graph_leaves_no_copy_without_its_memory():
    store = late_store()
    offloaded = [store.store(tensor) for tensor in numbered(4)]
    store.start_back(offloaded[2])
    store.start_back(offloaded[3])
    store.load(offloaded.pop())
    offloaded.clear()
    again = [store.store(tensor) for tensor in numbered(4)]
    assert [float(store.load(tensor)[0, 0, 0]) for tensor in reversed(again)] == [3.0, 2.0, 1.0, 0.0]


def test_a_buffer_is_not_filled_again_before_it_was_read():
    store = late_store()
    first = store.store(torch.full((1, 4, 8), 1.0))
    store.start_back(first)
    loaded = store.load(first)
    del first
    second = store.store(torch.full((1, 4, 8), 2.0))
    assert torch.equal(loaded, torch.full((1, 4, 8), 1.0))
    assert torch.equal(store.load(second), torch.full((1, 4, 8), 2.0))
    assert store.host_bytes == 4 * 8 * 4


def test_pictures_of_like_size_share_buffers():
    store = ActivationStore(CPU)
    for length in (4096, 4032, 4080, 3968, 4088):  # tokens of buckets near one megapixel
        offloaded = [store.store(torch.zeros(1, length, 8)) for _ in range(6)]
        del offloaded
    assert store.host_bytes == 6 * 4096 * 8 * 4


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_training_over_late_copy_streams_gives_the_same_bits(count, monkeypatch):
    gradients = []
    for offload in (False, True):
        model = tiny_mmdit("sd35-medium", depth=4)
        model.keep_activations(["none"] * model.architecture.depth)
        layers = add_adapters(model, ["attn.qkv", "context_embedder"])
        if offload:
            monkeypatch.setattr("sd3pipe.memory.activations.copy_stream_to", lambda device: LateCopyStream())
        with BlockStreamer(
            model, blocks_to_swap=count, device="cpu", offload_activations=offload, stream=LateCopyStream()
        ) as streamer:
            for seed in range(2):
                model(**random_inputs(seed=seed)).square().mean().backward()
            assert bool(streamer.activations and streamer.activations.bytes_out) == offload
        gradients.append({name: p.grad for name, p in parameters(layers)})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
