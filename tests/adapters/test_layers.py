"""What one adapter layer computes: nothing when fresh, the right strength, masks that are functions of the sample."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from sd3pipe.adapters.dora import DoRA
from sd3pipe.adapters.dropout import BatchState, kept, uniform
from sd3pipe.adapters.kind import LayerSetup
from sd3pipe.adapters.loha import LoHa
from sd3pipe.adapters.lokr import LoKr
from sd3pipe.adapters.lora import LoRA, SplitLoRA
from sd3pipe.adapters.oft import OFT
from sd3pipe.adapters.oftv2 import OFTv2
from sd3pipe.adapters.targets import DropoutRates
from sd3pipe.adapters.weights import factor_pair, lokr_shapes
from sd3pipe.errors import InputError
from sd3pipe.models.linear import Linear

IN, OUT, RANK = 24, 36, 4
KINDS = ("lora", "split", "dora", "loha", "lokr", "lokr-whole", "oft", "oftv2", "oftv2-exact")


def make_linear(in_features=IN, out_features=OUT, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    linear = Linear(in_features, out_features, dtype=dtype)
    linear.weight.data.copy_(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
    linear.bias.data.copy_(torch.randn(out_features, generator=generator))
    return linear


def make_layer(kind, *, rank=RANK, alpha=2.0, dropout=None, stream=5, fresh=True):
    setup = LayerSetup(
        in_features=IN, out_features=OUT, rank=rank, alpha=alpha, dropout=dropout or DropoutRates(), batch=BatchState(),
        stream=stream,
    )  # fmt: skip
    match kind:
        case "lora":
            layer = LoRA(setup)
        case "split":
            layer = SplitLoRA(setup)
        case "dora":
            layer = DoRA(setup)
        case "loha":
            layer = LoHa(setup)
        case "lokr":
            layer = LoKr(setup, {"w1": (6, 4), "w2_a": (6, 4), "w2_b": (4, 6)})
        case "lokr-whole":
            layer = LoKr(setup, {"w1": (4, 4), "w2": (9, 6)})
        case "oft":
            layer = OFT(setup)
        case "oftv2" | "oftv2-exact":
            layer = OFTv2(setup, exact=kind == "oftv2-exact")
    layer.reset(torch.Generator().manual_seed(2))
    if kind == "dora":
        layer.measure(make_linear())
    if not fresh:
        generator = torch.Generator().manual_seed(3)
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def inputs(*axes):
    return torch.randn(*axes, IN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_layer_changes_nothing_bit_for_bit(kind, dtype):
    linear, x = make_linear(dtype=dtype), inputs(2, 5).to(dtype)
    layer = make_layer(kind)
    if kind == "dora":
        layer.measure(linear)
    assert torch.equal(layer(x, linear), linear.base(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
def test_output_is_that_of_the_merged_weight(kind, multiplier):
    linear, layer, x = make_linear(), make_layer(kind, fresh=False), inputs(3, 5)
    layer.multiplier = multiplier
    expected = functional.linear(x, layer.delta().merged(linear.weight, multiplier), linear.bias)
    torch.testing.assert_close(layer(x, linear), expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    assert (layer(x, linear) - linear.base(x)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_per_sample_is_adapted_like_a_token(kind):
    linear, layer, x = make_linear(), make_layer(kind, fresh=False), inputs(3, 5)
    torch.testing.assert_close(layer(x[:, 0], linear), layer(x, linear)[:, 0])


def test_lora_acts_at_alpha_over_rank():
    layer, x = make_layer("lora", rank=4, alpha=2.0, fresh=False), inputs(2, 5)
    torch.testing.assert_close(layer.term(x), 0.5 * x @ layer.down.T @ layer.up.T)


def test_down_starts_as_a_linear_layer_of_torch_does():
    down = make_layer("lora", rank=64).down
    bound = IN**-0.5
    assert down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert down.mean().abs() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_trained_layer_gets_a_gradient(kind):
    linear, layer, x = make_linear(), make_layer(kind, fresh=False), inputs(2, 5)
    layer(x, linear).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert linear.weight.grad is None


def test_split_layer_as_one_lora_has_three_times_rank_and_alpha():
    layer = make_layer("split", rank=4, alpha=2.0, fresh=False)
    delta = layer.delta()
    assert (delta.rank, delta.alpha) == (12, 6.0)
    x = inputs(2, 5)
    parts = [0.5 * x @ layer.down[4 * i : 4 * i + 4].T @ layer.up[i].T for i in range(3)]
    torch.testing.assert_close(x @ delta.dense().T, torch.cat(parts, dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_factors_load_into_a_fresh_layer_bit_for_bit(kind):
    trained, fresh = make_layer(kind, fresh=False), make_layer(kind)
    fresh.load(trained.delta())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fresh.parameters(), trained.parameters(), strict=True))


def test_split_layer_refuses_factors_that_share_ranks():
    shared = make_layer("lora", rank=12, alpha=6.0, fresh=False)
    with pytest.raises(InputError, match="split_qkv"):
        make_layer("split", rank=4, alpha=2.0).load(shared.delta())


@pytest.mark.parametrize("other", [{"rank": 5}, {"alpha": 3.0}])
def test_factors_of_another_rank_or_scale_are_refused(other):
    with pytest.raises(InputError, match=r"rank|acts at"):
        make_layer("lora").load(make_layer("lora", **other).delta())


def test_dora_equals_peft():
    linear, layer, x = make_linear(), make_layer("dora", alpha=6.0, fresh=False), inputs(2, 5)
    model = nn.Sequential(nn.Linear(IN, OUT))
    model[0].load_state_dict(linear.state_dict())
    config = LoraConfig(r=RANK, lora_alpha=6.0, use_dora=True, target_modules=["0"], lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        model[0].lora_A["default"].weight.copy_(layer.down)
        model[0].lora_B["default"].weight.copy_(layer.up)
        model[0].lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    ours, theirs = layer(x, linear), model(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    oracle = {
        "down": model[0].lora_A["default"].weight,
        "up": model[0].lora_B["default"].weight,
        "magnitude": model[0].lora_magnitude_vector["default"].weight,
    }
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, oracle[name].grad, rtol=1e-4, atol=1e-4)


def test_lokr_equals_the_kronecker_product():
    layer, x = make_layer("lokr", alpha=3.0, fresh=False), inputs(2, 5)
    w1, w2 = layer.w1[0], layer.w2[0] @ layer.w2[1]
    torch.testing.assert_close(layer.term(x), x @ torch.kron(w1, w2).T * (3.0 / RANK))


@pytest.mark.parametrize("number", [2, 12, 64, 97, 1536, 2432, 9728])
def test_kronecker_factors_multiply_to_the_width(number):
    for largest in (-1, 4, 16):
        small, large = factor_pair(number, largest)
        assert small * large == number and small <= large
        assert largest < 1 or small <= largest
    assert factor_pair(2432, -1) == (38, 64)
    assert factor_pair(2432, 16) == (16, 152)


def test_lokr_is_whole_where_the_rank_is_not_smaller():
    assert lokr_shapes(2432, 2432, 16, -1) == {"w1": (38, 38), "w2_a": (64, 16), "w2_b": (16, 64)}
    assert lokr_shapes(2432, 2432, 32, -1) == {"w1": (38, 38), "w2": (64, 64)}


@pytest.mark.parametrize("kind", ["lora", "split", "dora"])
def test_norm_limit_bounds_the_change_and_leaves_smaller_ones(kind):
    layer = make_layer(kind, fresh=False)
    before = layer.delta()
    norm, shrunk = layer.limit_norm(1e6)
    assert not shrunk and before.difference(layer.delta()) == 0.0
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(before.dense()).item(), rel=1e-5)
    norm, shrunk = layer.limit_norm(0.5)
    assert shrunk and norm.item() == 0.5
    assert torch.linalg.vector_norm(layer.delta().dense()).item() == pytest.approx(0.5, rel=1e-5)


def test_masks_depend_on_the_sample_alone():
    keys = torch.tensor([11, 12, 13])
    whole = uniform(keys, torch.tensor(7), (3, 4, 5))
    assert torch.equal(uniform(keys[[2, 0]], torch.tensor(7), (2, 4, 5)), whole[[2, 0]])
    assert not torch.equal(uniform(keys, torch.tensor(8), (3, 4, 5)), whole)
    assert len(set(whole.flatten().tolist())) == 60


def test_masks_are_uniform():
    numbers = uniform(torch.arange(50), torch.tensor(3), (50, 2000))
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
    assert (counts - 5000).abs().max() < 350  # 5 standard deviations of sqrt(5000 * 0.95)
    assert torch.corrcoef(numbers[:10]).fill_diagonal_(0).abs().max() < 0.1
    assert kept(torch.arange(50), torch.tensor(3), (50, 2000), 0.3).float().mean().item() == pytest.approx(
        0.7, abs=0.01
    )


def test_masks_are_what_they_were():
    """Guards resumed runs: a change of these numbers changes what a killed run would have computed."""
    numbers = uniform(torch.tensor([42, -1]), torch.tensor(123456789), (2, 3))
    bits = (numbers * 2**24).to(torch.int64).tolist()
    assert bits == GOLDEN_BITS


GOLDEN_BITS = [[6148005, 11018589, 5130503], [7209050, 10562258, 11959317]]


@pytest.mark.parametrize("rates", [{"neuron": 0.4}, {"rank": 0.4}, {"module": 0.4}])
def test_dropout_acts_in_training_only_and_the_same_way_again(rates):
    linear, x = make_linear(), inputs(16, 5)
    layer = make_layer("lora", dropout=DropoutRates(**rates), fresh=False)
    plain = make_layer("lora", fresh=False)
    layer.setup.batch.keys = torch.arange(16)
    first = layer(x, linear)
    assert torch.equal(layer(x, linear), first)
    assert not torch.allclose(first, plain(x, linear))
    layer.setup.batch.keys = torch.arange(100, 116)
    assert not torch.allclose(layer(x, linear), first)
    layer.eval()
    assert torch.equal(layer(x, linear), plain(x, linear))


@pytest.mark.parametrize("rates", [{"neuron": 0.3}, {"rank": 0.3}])
def test_dropout_keeps_the_mean(rates):
    linear, x = make_linear(), inputs(1, 1).expand(20000, 1, IN)
    layer = make_layer("lora", dropout=DropoutRates(**rates), fresh=False)
    layer.setup.batch.keys = torch.arange(20000)
    term = layer(x, linear) - linear.base(x)
    layer.eval()
    expected = (layer(x[:1], linear) - linear.base(x[:1]))[0, 0]
    torch.testing.assert_close(term.mean(0)[0], expected, atol=0.05, rtol=0.05)


def test_module_dropout_drops_whole_samples():
    linear, x = make_linear(), inputs(64, 5)
    layer = make_layer("lora", dropout=DropoutRates(module=0.25), fresh=False)
    layer.setup.batch.keys = torch.arange(64)
    changed = (layer(x, linear) - linear.base(x)).abs().amax(dim=(1, 2)) > 0
    assert 0 < (~changed).sum() < 32
    layer.eval()
    plain = layer(x, linear)
    layer.train()
    assert torch.equal(layer(x, linear)[changed], plain[changed])


def test_rank_dropout_drops_the_same_ranks_for_all_tokens_of_a_sample():
    layer = make_layer("lora", dropout=DropoutRates(rank=0.5), fresh=False)
    layer.setup.batch.keys = torch.arange(32)
    low = layer.drop_ranks(torch.ones(32, 7, RANK))
    assert torch.equal(low, low[:, :1].expand_as(low))
    assert set(low.unique().tolist()) == {0.0, 2.0}


def test_rates_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank dropout"):
        DropoutRates(rank=1.0)


def test_difference_sees_strength_direction_and_magnitude():
    delta = make_layer("dora", fresh=False).delta()
    assert delta.difference(delta) == 0.0
    direction = delta.direction
    louder = replace(delta, direction=replace(direction, up=direction.up * 1.01))
    assert delta.difference(louder) == pytest.approx(0.01, rel=1e-4)
    heavier = replace(delta, magnitude=delta.magnitude * 1.02)
    assert delta.difference(heavier) == pytest.approx(0.02, rel=1e-4)
    regauged = replace(delta, direction=replace(direction, down=direction.down * 3, up=direction.up / 3))
    assert delta.difference(regauged) < 1e-6
