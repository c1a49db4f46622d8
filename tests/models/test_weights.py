"""Tensors arrive in their final place and number format, each byte read once, with no second copy in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_mmdit import random_inputs, tiny_mmdit
from support.tiny_parts import save_part, save_single_file

from sd3pipe.errors import InputError
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.checkpoint import as_source, load_mmdit, load_vae
from sd3pipe.models.sources import find_component
from sd3pipe.tensors.reader import TensorReader, read_tensors


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("model") / "sd3.5.safetensors", parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_format_is_what_torch_converts_to(parts, model, dtype):
    for key, tensor in read_tensors(find_component("clip_g", model=model).tensors, dtype=dtype).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, parts["clip_g"][key].to(dtype)), key


def test_a_subset_of_keys_is_read_in_the_order_asked_for(parts, model):
    keys = ["encoder.final_layer_norm.weight", "shared.weight"]
    found = read_tensors(find_component("t5xxl", model=model).tensors, dtype=torch.float32, keys=keys)
    assert list(found) == keys
    assert torch.equal(found[keys[1]], parts["t5xxl"][keys[1]].float())


def test_unknown_key_is_a_key_error(model):
    with pytest.raises(KeyError):
        read_tensors(find_component("t5xxl", model=model).tensors, dtype=None, keys=["absent"])


def test_every_byte_is_read_once(model, monkeypatch):
    source, read = find_component("mmdit", model=model), []
    original = os.preadv

    def counting(handle, buffers, offset):
        count = original(handle, buffers, offset)
        read.append((offset, offset + count))
        return count

    monkeypatch.setattr("os.preadv", counting)
    for dtype in (torch.bfloat16, torch.float32):
        read.clear()
        read_tensors(source.tensors, dtype=dtype)
        assert sum(stop - start for start, stop in read) == source.nbytes
        ends = [stop for _, stop in sorted(read)]
        assert all(start >= end for end, (start, _) in zip(ends, sorted(read)[1:], strict=False))


@pytest.mark.long
def test_conversion_in_small_pieces_loses_nothing(parts, model, monkeypatch):
    monkeypatch.setattr("sd3pipe.tensors.reader._STAGING_BYTES", 480)
    found = read_tensors(find_component("vae", model=model).tensors, dtype=torch.float32)
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in parts["vae"].items())


def test_reader_fills_a_part_of_a_flat_buffer(parts, model):
    source = find_component("mmdit", model=model)
    key = "joint_blocks.1.x_block.mlp.fc1.weight"
    entry = source.tensors[key]
    for dtype in (torch.bfloat16, torch.float32):
        flat = torch.full((1000 + parts["mmdit"][key].numel() + 7,), -5.0, dtype=dtype)
        with TensorReader() as reader:
            reader.read_into(entry, flat[1000:-7].view(entry.shape))
        assert torch.equal(flat[1000:-7].view(entry.shape), parts["mmdit"][key].to(dtype))
        assert (flat[:1000] == -5).all() and (flat[-7:] == -5).all()


def test_reader_refuses_a_destination_of_another_shape_or_with_gaps(model):
    entry = find_component("mmdit", model=model).tensors["context_embedder.weight"]
    with TensorReader() as reader, pytest.raises(ValueError, match="contiguous"):
        reader.read_into(entry, torch.empty(entry.shape[0], entry.shape[1] + 1))
    with TensorReader() as reader, pytest.raises(ValueError, match="contiguous"):
        reader.read_into(entry, torch.empty(entry.shape[::-1]).T)


def test_file_that_shrinks_after_its_header_was_read_is_an_input_error(parts, tmp_path):
    path = save_part(tmp_path / "vae.safetensors", parts["vae"])
    source = find_component("vae", model=path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(InputError, match="became shorter"):
        read_tensors(source.tensors, dtype=None)
    with pytest.raises(InputError, match="became shorter"):
        source.fingerprint()


def test_file_that_vanishes_after_its_header_was_read_is_an_input_error(parts, tmp_path):
    path = save_part(tmp_path / "vae.safetensors", parts["vae"])
    source = find_component("vae", model=path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_tensors(source.tensors, dtype=None)


@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_loaded_mmdit_is_frozen_holds_the_bits_and_predicts(tmp_path, variant):
    expected = tiny_mmdit(variant)
    save_file(expected.state_dict(), tmp_path / "mmdit.safetensors")
    mmdit = load_mmdit(tmp_path / "mmdit.safetensors")
    assert mmdit.architecture.variant == variant
    assert not mmdit.training and not any(parameter.requires_grad for parameter in mmdit.parameters())
    inputs = random_inputs()
    assert torch.equal(mmdit(**inputs), expected(**inputs))


def test_loaded_vae_is_frozen_and_in_the_format_asked_for(parts, model):
    vae = load_vae(str(model), dtype=torch.bfloat16)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    assert all(torch.equal(tensor, parts["vae"][key]) for key, tensor in vae.state_dict().items())


def test_a_found_source_is_taken_as_it_is(model):
    source = find_component("mmdit", model=model)
    assert as_source("mmdit", source) is source
    assert mmdit_architecture(source) == load_mmdit(source).architecture


def test_mmdit_error_names_the_file(parts, tmp_path):
    tensors = parts["mmdit"] | {"context_embedder.weight": torch.zeros(3, 3)}
    path = save_part(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(InputError, match=r"odd\.safetensors: the MMDiT has tensors of unexpected shape"):
        load_mmdit(path)


PEAK_OF_A_LOAD = """
import sys
import torch
from sd3pipe.models.sources import find_component
from sd3pipe.tensors.reader import read_tensors
source = find_component("clip_g", model=None, file=sys.argv[1])
dtype = getattr(torch, sys.argv[2])
torch.zeros(1000).to(dtype).sum()

def peak_bytes():  # of this program alone; getrusage would count what the parent had before exec
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak_bytes()
kept = sum(tensor.nbytes for tensor in read_tensors(source.tensors, dtype=dtype).values())
print((peak_bytes() - before) / kept)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peak_memory_is_what_is_kept(tmp_path, dtype):
    layer = "text_model.encoder.layers.{}.layer_norm1.weight"
    tensors = {layer.format(i): torch.ones(16 << 20, dtype=torch.float16) for i in range(12)}  # 400 MB
    path = save_part(tmp_path / "clip_g.safetensors", tensors)
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_LOAD, str(path), dtype], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.15
