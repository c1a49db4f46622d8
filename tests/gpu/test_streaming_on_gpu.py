"""What only a CUDA device can show: page-locked memory, copies beside the computation, device memory."""

import pytest
import torch
from support.streaming_cases import add_adapters, parameters
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.memory.host import HostMemory
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.memory.plan import Settings, Workload, predict
from sd3pipe.memory.quantise import quantise
from sd3pipe.memory.sizes import model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.training.rates import COPY_BYTES, measure_rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
CUDA = torch.device("cuda")
DEPTH = 8


@pytest.fixture(autouse=True)
def deterministic_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(**sizes):
    return {name: tensor.to(CUDA) for name, tensor in random_inputs(**sizes).items()}


def _train(variant, *, base_format=None, steps=3, **streaming):
    """Losses and gradients of a few steps, copied back to the host."""
    model = tiny_mmdit(variant, depth=DEPTH, dtype=torch.bfloat16)
    if base_format is not None:
        quantise(model.to(CUDA), base_format)
    model.keep_activations(["none"] * model.architecture.depth)
    layers = add_adapters(model, ["attn.qkv", "adaLN_modulation.1"])
    for layer in layers.values():
        layer.to(CUDA)
    optimizer = torch.optim.AdamW([p for _, p in parameters(layers)], lr=1e-3)
    results = {}
    with BlockStreamer(model, device=CUDA, **streaming):
        for step in range(steps):
            optimizer.zero_grad()
            loss = model(**_inputs(seed=step, height=16, width=16)).float().square().mean()
            loss.backward()
            results[f"loss {step}"] = loss.detach().cpu()
            results |= {f"gradient {step} {name}": p.grad.cpu() for name, p in parameters(layers)}
            optimizer.step()
    return results


@pytest.mark.parametrize("base_format", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("modulation", ["stream", "resident"])
@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_streamed_training_equals_resident_training_bit_for_bit(variant, modulation, base_format):
    resident = _train(variant, base_format=base_format, blocks_to_swap=0)
    for count, offload in ((DEPTH // 2, False), (DEPTH, True)):
        streamed = _train(
            variant,
            base_format=base_format,
            blocks_to_swap=count,
            modulation=modulation,
            offload_activations=offload,
        )
        for (name, tensor), other in zip(resident.items(), streamed.values(), strict=True):
            assert torch.equal(tensor, other), name


def test_modulation_ahead_agrees_with_the_device_to_rounding():
    resident = _train("sd35-large", blocks_to_swap=0, steps=1)
    ahead = _train("sd35-large", blocks_to_swap=DEPTH, modulation="ahead", steps=1)
    # bf16 keeps 8 bits; host and device sum in another order
    torch.testing.assert_close(ahead["loss 0"], resident["loss 0"], rtol=0.02, atol=0.0)


def test_layer_major_equals_the_ordinary_order():
    gradients = []
    for layer_major in (False, True):
        model = tiny_mmdit("sd35-medium", depth=4)
        layers = add_adapters(model, ["attn.qkv"])
        for layer in layers.values():
            layer.to(CUDA)
        batches = [_inputs(seed=seed) for seed in range(3)]
        with BlockStreamer(model, blocks_to_swap=4, device=CUDA) as streamer:
            if layer_major:
                run_layer_major(model, streamer, batches, lambda _, velocity: velocity.square().mean())
            else:
                for inputs in batches:
                    model(**inputs).square().mean().backward()
        gradients.append([p.grad.cpu() for _, p in parameters(layers)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_host_buffers_are_page_locked_at_their_exact_size():
    memory = HostMemory(CUDA)
    buffer = memory.buffer(5_000_000)
    assert memory.pinned
    assert buffer.is_pinned()
    assert memory.pinned_bytes == 5_000_000
    memory.close()
    assert not buffer.is_pinned()
    buffer.fill_(7)  # still ordinary memory
    assert int(buffer[-1]) == 7


def test_device_memory_stays_within_the_prediction():
    architecture = tiny_architecture("sd35-large", DEPTH)
    work = Workload(image_tokens=64, text_tokens=10)
    wanted = Settings(blocks_to_swap=DEPTH, modulation="stream")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _train("sd35-large", blocks_to_swap=DEPTH, steps=2)
    used = torch.cuda.max_memory_allocated() - before
    prediction = predict(model_size(architecture.shapes()), work, wanted)
    assert used < prediction.device_bytes
    streamed_bytes = prediction.host_parts["streamed blocks"]
    assert used < streamed_bytes + prediction.device_parts["CUDA"]


def test_rates_are_plausible():
    rates = measure_rates(
        tiny_architecture("sd35-large", 16), Workload(image_tokens=1024), device=CUDA, dtype=torch.bfloat16
    )
    source = torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=CUDA)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (start, end):  # the first copy is not timed
        target.copy_(source, non_blocking=True)
        event.record()
    torch.cuda.synchronize()
    page_locked = COPY_BYTES / (start.elapsed_time(end) / 1000)
    assert 0.7 * page_locked < rates.copy_bytes_per_second < 1.5 * page_locked
    assert 1e11 < rates.flop_per_second < 5e15
