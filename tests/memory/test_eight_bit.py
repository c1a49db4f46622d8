"""Products in eight bits: exact integer arithmetic, gradients with folded scales, rotation, streaming."""

import pytest
import torch
from support.streaming_cases import PoisoningCopyStream, train
from support.tiny_mmdit import random_inputs, tiny_mmdit
from torch.utils._python_dispatch import TorchDispatchMode

from sd3pipe.errors import ParameterError
from sd3pipe.memory.eight_bit import EightBitProducts, hadamard_signs, integer_product, rotation_side
from sd3pipe.memory.quantise import quantise_as
from sd3pipe.models.linear import Linear

CPU = torch.device("cpu")
FORMATS = ["int8", "fp8"]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _linear(format, *, rotated, in_features=256, out_features=96):
    """A packed linear layer, and its weight before."""
    layer = Linear(in_features, out_features)
    layer.weight.copy_(torch.randn(out_features, in_features, generator=_generator(0)))
    layer.weight.mul_(1 + 5 * torch.rand(out_features, 1, generator=_generator(1)))  # rows of different size
    layer.bias.copy_(torch.randn(out_features, generator=_generator(2)))
    exact_OI = layer.weight.clone()
    holder = torch.nn.Sequential()
    holder.add_module("mlp", torch.nn.Sequential(layer))
    quantise_as(holder, EightBitProducts(format, rotated=rotated, device=CPU))
    return layer, exact_OI


def _error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(32, 64, 96), (40, 9728, 16)])
def test_the_reference_product_is_torchs_integer_product_to_the_bit(shape):
    rows, sums, columns = shape
    a = torch.randint(-127, 128, (rows, sums), generator=_generator(0), dtype=torch.int8)
    b = torch.randint(-127, 128, (sums, columns), generator=_generator(1), dtype=torch.int8)
    a[0], b[:, 0] = 127, 127  # the largest sum that there can be: beyond what float32 counts exactly
    assert torch.equal(integer_product(a, b), torch._int_mm(a, b))
    assert torch.equal(integer_product(a, b.t().contiguous().t()), torch._int_mm(a, b))


def test_output_and_gradient_are_integer_sums_times_scales():
    layer, _ = _linear("int8", rotated=False)
    x = torch.randn(20, 256, generator=_generator(3)).requires_grad_()
    direction = torch.randn(20, 96, generator=_generator(4))
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, direction)

    def rounded(rows):
        scale = rows.abs().amax(dim=1) / 127
        return (rows / scale[:, None]).round().long(), scale

    weight, weight_scale = layer.weight.long(), layer.weight_scale
    values, scale = rounded(x.detach())
    assert torch.equal(y, (values @ weight.t()).float() * scale[:, None] * weight_scale + layer.bias)
    values, scale = rounded(direction * weight_scale)  # the sum runs over output channels: their scales come first
    assert torch.equal(gradient, (values @ weight).float() * scale[:, None])


class OneDeviceProducts(TorchDispatchMode):
    """Fails at a product over devices, as a GPU does; the device without data takes tensors of any."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {tensor.device.type for tensor in args if isinstance(tensor, torch.Tensor)}
        assert len(devices) < 2 or not str(func).startswith(("aten.mm", "aten.bmm")), f"{func} over {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("format, largest", [("int8", 0.012), ("fp8", 0.05)])  # steps of 1/127; 4 significant bits
def test_products_are_near_those_of_the_weight_before(format, largest, rotated):
    layer, exact_OI = _linear(format, rotated=rotated)
    x = torch.randn(2, 20, 256, generator=_generator(3)).requires_grad_()
    direction = torch.randn(2, 20, 96, generator=_generator(4))
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert _error(y, x @ exact_OI.t() + layer.bias) < largest
    assert _error(gradient, direction @ exact_OI) < largest
    assert _error(layer.dense_weight(), exact_OI) < largest


def test_a_weight_is_unpacked_where_it_lies():
    """Packed on one device and kept on another, as a streamed block's is; the one without data stands in for it."""
    layer, _ = _linear("int8", rotated=True)
    layer.to("meta")
    with OneDeviceProducts():
        assert layer.dense_weight().device.type == "meta"


def test_a_rotation_changes_nothing_but_the_rounding():
    for side in (1, 2, 64, 128):
        signs = hadamard_signs(side)
        assert torch.equal(signs, signs.t())
        assert torch.equal(signs @ signs, side * torch.eye(side))
    assert [rotation_side(width) for width in (2432, 9728, 1536, 192, 96)] == [128, 128, 128, 64, 32]


@pytest.mark.parametrize("format", FORMATS)
def test_a_rotation_takes_the_harm_of_large_channels_out_of_whole_numbers(format):
    x = torch.randn(40, 256, generator=_generator(3))
    x[:, 7] *= 100  # as in large models, a few channels are much larger than all others
    errors = {}
    for rotated in (False, True):
        layer, exact_OI = _linear(format, rotated=rotated)
        exact_OI[:, 7] /= 100  # and their weights small
        layer.weight.data, layer.weight_scale.data = layer.packing.pack(exact_OI)
        errors[rotated] = _error(layer(x), x @ exact_OI.t() + layer.bias)
    if format == "int8":
        assert errors[True] < 0.25 * errors[False] < 0.07
    else:  # floating point keeps small values beside large ones by itself, until they are mixed
        assert errors[False] < 0.05 < errors[True]


@pytest.mark.long
@pytest.mark.parametrize("format", FORMATS)
def test_streaming_changes_no_bit(format):
    def run(**streaming):
        model = tiny_mmdit("sd35-medium", dtype=torch.bfloat16)
        quantise_as(model, EightBitProducts(format, rotated=True, device=CPU))
        return train(model, steps=1, **streaming)

    resident = run()
    for kept in ("none", "all"):
        streamed = run(blocks_to_swap=3, kept=[kept] * 3, stream=PoisoningCopyStream())
        assert all(torch.equal(tensor, streamed[name]) for name, tensor in resident.items())


@pytest.mark.parametrize("format, largest", [("int8", 0.03), ("fp8", 0.12)])
def test_velocity_stays_near_the_dense_base(format, largest):
    inputs, model = random_inputs(), tiny_mmdit("sd35-large")
    exact = model(**inputs)
    quantise_as(model, EightBitProducts(format, rotated=True, device=CPU))
    assert 1e-4 < _error(model(**inputs), exact) < largest


@pytest.mark.parametrize("format, capability", [("int8", (7, 0)), ("fp8", (8, 6))])
def test_a_card_without_such_products_is_told_so(format, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ParameterError, match=f"--matmul-dtype {format}: this card has no such products"):
        EightBitProducts(format, rotated=True, device=torch.device("cuda"))
