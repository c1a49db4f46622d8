"""Single parts on a CUDA device: 8-bit products, kept activations, blocks in the file, T5 streamed, VAE in strips."""

import pytest
import torch
from support.comparing import relative_error
from support.streaming_cases import add_adapters, parameters
from support.text_encoding import encode, equal_bits
from support.tiny_base import write_tiny_base
from support.tiny_mmdit import random_inputs, tiny_mmdit
from support.tiny_parts import TINY_VAE, random_tensors
from support.tiny_training import make_inputs, pictures

from sd3pipe.errors import DeviceMemoryError
from sd3pipe.memory.eight_bit import EightBitProducts, integer_product
from sd3pipe.memory.from_file import WeightsFile
from sd3pipe.memory.quantise import quantise_as
from sd3pipe.memory.schedule import kept_activations
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_strips import decode_in_strips

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DEPTH = 6


@pytest.mark.parametrize("rows", [5, 77, 4429])
def test_integer_products_are_the_reference_ones_to_the_bit(rows):
    a = torch.randint(-127, 128, (rows, 1536), dtype=torch.int8)
    b = torch.randint(-127, 128, (1536, 320), dtype=torch.int8)
    for right in (b, b.t().contiguous().t()):
        assert torch.equal(integer_product(a.to(CUDA), right.to(CUDA)).cpu(), integer_product(a, b))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_products_in_8_bits_are_near_the_reference_in_both_directions(format):
    if format == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8 products")
    results = []
    for device in (CPU, CUDA):
        model = tiny_mmdit("sd35-large", dtype=torch.bfloat16)
        quantise_as(model, EightBitProducts(format, rotated=format == "int8", device=CPU))
        layers = add_adapters(model, ["attn.qkv"])
        model.to(device)
        for layer in layers.values():
            layer.to(device)
        for linear in (linear for _, linear in model.linears()):
            if linear.packing is not None:
                linear.packing._signs = {side: signs.to(device) for side, signs in linear.packing._signs.items()}
        inputs = {name: tensor.to(device) for name, tensor in random_inputs(dtype=torch.bfloat16).items()}
        velocity = model(**inputs)
        velocity.float().square().mean().backward()
        results.append([velocity.float().cpu(), *(p.grad.float().cpu() for _, p in parameters(layers))])
    for reference, found in zip(*results, strict=True):
        assert relative_error(found, reference) < 0.1  # bf16 sums in another order, which then round to other steps


def test_kept_activations_and_blocks_in_the_file_change_no_bit(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    ways = [(0, 0, 0, 0), (0, 0, DEPTH, 0), (DEPTH, 0, 0, 3), (DEPTH, DEPTH, 0, 0), (DEPTH, 2, 2, DEPTH), (4, 3, 3, 2)]
    results = []
    for streamed, all_kept, attention_kept, from_file in ways:
        model = tiny_mmdit("sd35-medium", depth=DEPTH, dtype=torch.bfloat16)
        stored = {name: p.detach().clone() for name, p in model.joint_blocks.named_parameters()}

        def read(index, name, destination, stored=stored):
            destination.copy_(stored[f"{index}.{name}"])

        layers = add_adapters(model, ["attn.qkv", "adaLN_modulation.1"])
        for layer in layers.values():
            layer.to(CUDA)
        model.keep_activations(kept_activations(DEPTH, all_kept=all_kept, attention_kept=attention_kept))
        file = WeightsFile(blocks=from_file, dtype=torch.bfloat16, read=read)
        with BlockStreamer(model, blocks_to_swap=streamed, device=CUDA, file=file):
            for seed in range(3):
                inputs = {name: tensor.to(CUDA) for name, tensor in random_inputs(seed=seed, height=16).items()}
                model(**inputs).float().square().mean().backward()
        results.append([p.grad.cpu() for _, p in parameters(layers)])
    torch.use_deterministic_algorithms(False)
    for way, found in zip(ways[1:], results[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True)), way


def test_t5_streamed_gives_the_bits_of_t5_resident(tmp_path):
    base = write_tiny_base(tmp_path / "base")
    resident, streamed = (
        encode(base, ["a red square", ""], tmp_path, stream_t5=stream, device="cuda") for stream in (False, True)
    )
    assert all(map(equal_bits, resident, streamed))


def test_the_vae_in_strips_is_the_whole_vae():
    vae = VAE(TINY_VAE)
    vae.load_state_dict(random_tensors(TINY_VAE.shapes(), torch.float32, seed=4))
    vae.eval().requires_grad_(False).to(CUDA)
    latents_BChw = torch.randn(1, 16, 32, 24, device=CUDA)
    found = decode_in_strips(vae, latents_BChw, strip_bytes=1 << 18)
    assert relative_error(found.cpu(), vae.decode(latents_BChw).cpu()) < 1e-3


def test_a_full_card_ends_with_exit_8(tmp_path):
    inputs = make_inputs(tmp_path, pictures(2), depth=DEPTH, device="auto")
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(1e6 / total)
    torch.cuda.empty_cache()
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            inputs.train("full", blocks_to_swap=0, gradient_checkpointing="on")
        assert caught.value.exit_code == 8
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
