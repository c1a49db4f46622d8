"""EMA, bfloat16 with stochastic rounding, schedule-free averages, and optimizer state as plain tensors."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sd3pipe.errors import InputError, ParameterError
from sd3pipe.training.key_values import parse_args
from sd3pipe.training.optimizers import export_state, import_state, make_optimizer
from sd3pipe.training.trained_weights import TrainedWeights, stochastically_rounded


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(6, 4, generator=generator).to(dtype))
        self.down = nn.Parameter(torch.randn(4, 8, generator=generator).to(dtype))


def train(network: Network, weights: TrainedWeights, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in weights.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        weights.begin_update()
        optimizer.step()
        weights.end_update(step)
        weights.move_average(step)


def build(dtype: torch.dtype = torch.float32, name: str = "AdamW", ema: float | None = None, **args):
    network = Network(dtype)
    weights = TrainedWeights(network, seed=1, ema_decay=ema)
    rates = (1.0, 1.0) if name.startswith("Prodigy") else (0.1, 0.01)
    groups = [{"params": [p], "lr": rate} for p, rate in zip((network.up, network.down), rates, strict=True)]
    if name == "ProdigyPlusScheduleFree":
        args = {"d0": 1e-2, **args}  # its first steps are as small as that, and bfloat16 would not show them
    return network, weights, make_optimizer(name, weights.optimizer_groups(groups), args)


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: sd3pipe[optimizers]")


NAMES = [
    "AdamW", "Adam", "RAdam", "NAdam", "Adafactor", "SGDNesterov", "Lion", "AdamW8bit", "Lion8bit", "PagedAdamW8bit",
    "PagedAdamW", "AdEMAMix8bit", "SGDNesterov8bit", "Prodigy", "AdamWScheduleFree", "RAdamScheduleFree",
    "SGDScheduleFree", "torch.optim.Adagrad", "schedulefree.AdamWScheduleFreeReference", "Muon",
    pytest.param("CAME", marks=needs("came_pytorch")),
    pytest.param("ProdigyPlusScheduleFree", marks=needs("prodigyplus")),
]  # fmt: skip


def saved_state(weights, optimizer):
    """Returns what a checkpoint reads back: optimizer's tensors, its values, weights."""
    tensors, values = export_state(optimizer, weights.optimized)
    copies, saved = ({name: t.clone() for name, t in kind.items()} for kind in (tensors, weights.export()))
    return copies, values, saved


def test_what_is_saved_is_no_second_copy():
    network, weights, optimizer = build()
    train(network, weights, optimizer, range(1))
    tensors, _ = export_state(optimizer, weights.optimized)
    saved = {tensor.data_ptr() for tensor in (*tensors.values(), *weights.export().values())}
    live = {tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()}
    assert live <= saved and {network.up.data_ptr(), network.down.data_ptr()} <= saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_to_the_bit(name, dtype):
    """After export and import into fresh objects, five more steps give the bits of ten without a break."""
    network, weights, optimizer = build(dtype, name, ema=None)
    train(network, weights, optimizer, range(5))
    tensors, values, saved = saved_state(weights, optimizer)
    train(network, weights, optimizer, range(5, 10))

    fresh, fresh_weights, fresh_optimizer = build(dtype, name, ema=None)
    fresh_weights.restore(saved)
    import_state(fresh_optimizer, fresh_weights.optimized, tensors, values)
    train(fresh, fresh_weights, fresh_optimizer, range(5, 10))
    assert torch.equal(fresh.up, network.up)
    assert torch.equal(fresh.down, network.down)
    assert not torch.equal(network.up, Network(dtype).up)


@needs("prodigyplus")
def test_state_that_an_optimizer_drops_on_its_way_is_not_asked_for():
    """Prodigy Plus forgets the start of a parameter once its step is settled."""
    settled = {"name": "ProdigyPlusScheduleFree", "prodigy_steps": 3}
    network, weights, optimizer = build(**settled)
    train(network, weights, optimizer, range(5))
    tensors, values, saved = saved_state(weights, optimizer)
    assert not any(path.endswith("/p0") for path in tensors)
    train(network, weights, optimizer, range(5, 8))
    fresh, fresh_weights, fresh_optimizer = build(**settled)
    fresh_weights.restore(saved)
    import_state(fresh_optimizer, fresh_weights.optimized, tensors, values)
    train(fresh, fresh_weights, fresh_optimizer, range(5, 8))
    assert torch.equal(fresh.up, network.up)


def test_muon_moves_as_far_as_adamw_and_takes_matrices_alone():
    moved = {}
    for name in ("Muon", "AdamW"):
        network, weights, optimizer = build(name=name, weight_decay=0.0)
        before = network.up.detach().clone()
        train(network, weights, optimizer, range(1))
        moved[name] = (network.up.detach() - before).square().mean().sqrt().item()
    assert moved["Muon"] == pytest.approx(0.2 * moved["AdamW"], rel=0.5)  # its step is matched to AdamW's usual size
    with pytest.raises(ParameterError, match="only supports 2D parameters"):
        make_optimizer("Muon", [{"params": [nn.Parameter(torch.zeros(3))], "lr": 1.0}], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_run_can_go_back_to_where_it_was(dtype):
    network, weights, optimizer = build(dtype)
    train(network, weights, optimizer, range(3))
    tensors, values, saved = saved_state(weights, optimizer)
    train(network, weights, optimizer, range(3, 6))
    reached = network.up.detach().clone()
    weights.restore(saved)
    import_state(optimizer, weights.optimized, tensors, values)
    train(network, weights, optimizer, range(3, 6))
    assert torch.equal(network.up, reached)


@pytest.mark.parametrize(
    ("name", "args", "kept"),
    [
        ("AdamW", {"betas": (0.5, 0.6), "weight_decay": 0.5}, "fused"),
        ("Prodigy", {"d_coef": 2.0}, "d_numerator"),
        ("AdamWScheduleFree", {"weight_decay": 0.5}, "weight_sum"),
    ],
)
def test_other_arguments_act_beside_what_an_optimizer_keeps_of_its_own(name, args, kept):
    _, weights, optimizer = build(name=name)
    train(_, weights, optimizer, range(2))
    tensors, values, saved = saved_state(weights, optimizer)
    _, weights, other = build(name=name, **args)
    for _ in range(2):  # a run goes back to the same checkpoint after a bad loss
        weights.restore(saved)
        import_state(other, weights.optimized, tensors, values, made_by=(name, {}))
        for group, before in zip(other.param_groups, optimizer.param_groups, strict=True):
            assert {key: group[key] for key in args} == args
            assert group[kept] == before[kept]
        train(_, weights, other, range(2, 3))


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("AdamW", {"amsgrad": True}, "is not that of a AdamW"),
        ("Prodigy", {"d0": 1e-3}, "d0? of a Prodigy can only be set when it begins"),
        ("AdamWScheduleFree", {"betas": (0.5, 0.6)}, "betas of a AdamWScheduleFree can only be set when it begins"),
    ],
)
def test_arguments_that_cannot_change_on_the_way_are_refused(name, args, says):
    before = {"d0": 0.1} if name == "Prodigy" else {}
    _, weights, optimizer = build(name=name, **before)
    train(_, weights, optimizer, range(3))
    tensors, values = export_state(optimizer, weights.optimized)
    _, weights, other = build(name=name, **args)
    with pytest.raises(InputError, match=says):
        import_state(other, weights.optimized, tensors, values, made_by=(name, before))


def test_another_optimizer_of_the_same_state_has_its_own_defaults():
    _, weights, optimizer = build(name="Adam")
    train(_, weights, optimizer, range(1))
    tensors, values, _ = saved_state(weights, optimizer)
    _, weights, other = build(name="AdamW")
    import_state(other, weights.optimized, tensors, values, made_by=("Adam", {}))
    assert all(group["weight_decay"] == 0.01 and group["decoupled_weight_decay"] for group in other.param_groups)


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_form_is_refused(name):
    """A damaged state would fail, or be read wrongly, in the middle of a step."""
    network, weights, optimizer = build(name=name)
    train(network, weights, optimizer, range(2))
    tensors, values = export_state(optimizer, weights.optimized)
    largest = max((path for path in tensors if path.startswith("state/")), key=lambda path: tensors[path].numel())
    damaged = {
        "shorter": {**tensors, largest: tensors[largest].flatten()[:-1].clone()},
        "other numbers": {**tensors, largest: tensors[largest].to(torch.int16)},
        "renamed": {path.replace(largest, f"{largest}_2"): tensor for path, tensor in tensors.items()},
        "too many": {**tensors, f"{largest}_2": tensors[largest]},
    }
    for what, wrong in damaged.items():
        _, fresh_weights, fresh = build(name=name)
        with pytest.raises(InputError, match=f"is not that of a {type(optimizer).__name__}"):
            import_state(fresh, fresh_weights.optimized, wrong, values)
            pytest.fail(what)


def test_groups_keep_their_learning_rates():
    network, weights, optimizer = build()
    before = (network.up.detach().clone(), network.down.detach().clone())
    train(network, weights, optimizer, range(1))
    moved = [
        float((now.detach() - then).abs().mean()) for now, then in zip((network.up, network.down), before, strict=True)
    ]
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.1)  # Adam's first step is the learning rate itself


def test_the_average_is_delivered_and_the_training_weights_return():
    network, weights, optimizer = build(ema=0.5)
    average = network.up.detach().clone()
    for step in range(4):
        train(network, weights, optimizer, range(step, step + 1))
        average.lerp_(network.up.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    training = network.up.detach().clone()
    with weights.delivered(optimizer):
        assert torch.equal(network.up, average)
    assert torch.equal(network.up, training)


def test_schedule_free_weights_are_delivered_averaged():
    network, weights, optimizer = build(name="AdamWScheduleFree")
    train(network, weights, optimizer, range(6))
    training = network.up.detach().clone()
    with weights.delivered(optimizer):
        delivered = network.up.detach().clone()
    assert torch.equal(network.up, training)
    optimizer.eval()
    torch.testing.assert_close(network.up.detach(), delivered)
    assert not torch.equal(training, delivered)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    value = 1 + 2**-8 / 4  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7, is 2^-9
    rounded = stochastically_rounded(torch.full((100_000,), 1 + 2**-9), generator)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.006)  # four standard deviations
    exact = torch.tensor([0.0, -1.5, 3.0, float("inf"), float("nan")])
    assert torch.equal(stochastically_rounded(exact, generator).nan_to_num(7.0), exact.bfloat16().nan_to_num(7.0))
    below = stochastically_rounded(torch.full((1000,), -value), generator)
    assert set(below.tolist()) <= {-1.0, -(1 + 2**-7)}


def test_bf16_weights_take_steps_smaller_than_half_a_bit():
    network = Network(torch.bfloat16)
    weights = TrainedWeights(network, seed=1)
    nn.init.ones_(network.up)
    groups = weights.optimizer_groups([{"params": [network.up, network.down], "lr": 1e-4}])
    optimizer = make_optimizer("SGD", groups, {})
    for step in range(400):
        network.up.grad, network.down.grad = torch.full_like(network.up, -1.0), torch.zeros_like(network.down)
        weights.begin_update()
        optimizer.step()
        weights.end_update(step)
    assert float(network.up.detach().float().mean()) == pytest.approx(1.04, abs=0.006)
    assert all(copy.numel() == 0 for copy in weights.optimized)  # float32 copies live during the step alone


def test_prodigy_takes_one_learning_rate(caplog):
    network = Network()
    with pytest.raises(ParameterError, match="leave out lr_rules"):
        make_optimizer("Prodigy", [{"params": [network.up], "lr": 1.0}, {"params": [network.down], "lr": 2.0}], {})
    make_optimizer("Prodigy", [{"params": [network.up], "lr": 1e-4}], {})
    assert "set it near 1" in caplog.text


def test_args_are_python_literals():
    assert parse_args("optimizer_args", ["weight_decay=0.1", "betas=(0.9, 0.99)", "amsgrad=True"]) == {
        "weight_decay": 0.1,
        "betas": (0.9, 0.99),
        "amsgrad": True,
    }
    for wrong in ("weight_decay", "weight_decay=much", "weight_decay=__import__('os')"):
        with pytest.raises(ParameterError, match="optimizer_args"):
            parse_args("optimizer_args", [wrong])


def test_short_names_and_fused_kernels():
    assert build()[2].param_groups[0]["fused"]
    assert type(build(name="adamw8bit")[2]).__module__.startswith("bitsandbytes")
    assert build(name="SGDNesterov")[2].param_groups[0]["nesterov"]


def test_other_kernels_are_chosen_by_argument():
    assert not build(fused=False)[2].param_groups[0]["fused"]
    foreach = build(foreach=True)[2].param_groups[0]
    assert foreach["foreach"]
    assert not foreach["fused"]
    with pytest.raises(ParameterError, match="fused"):
        build(foreach=True, fused=True)
