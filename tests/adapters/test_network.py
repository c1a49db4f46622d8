"""Which layers are adapted, and what a whole network of them does."""

import dataclasses

import pytest
import torch
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.adapters.kinds import check_spec
from sd3pipe.adapters.lora import SplitLoRA
from sd3pipe.adapters.network import attach, attach_deltas, merge_into
from sd3pipe.adapters.targets import EMBEDDERS, AdapterSpec, DropoutRates, parse_blocks, part_of, target_ranks
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT

REAL = {
    "sd3-medium": MMDiTArchitecture(depth=24, pos_embed_max=192, qk_norm=False),
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
ALGORITHMS = ("lora", "dora", "loha", "lokr", "oft", "oftv2", "tlora")


def paths_of(variant):
    with torch.device("meta"):
        return [path for path, _ in MMDiT(tiny_architecture(variant)).linears()]


def disturb(network, size=0.05):
    generator = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("variant", "modules", "millions"),
    [("sd3-medium", 237, 26.7), ("sd35-medium", 263, 29.6), ("sd35-large", 377, 67.4)],
)
def test_default_targets_are_those_of_sd_scripts(variant, modules, millions):
    model = MMDiT(REAL[variant], device="meta")
    network = attach(model, AdapterSpec(rank=16), device="meta")
    assert len(network.layers) == modules
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert not any(path.startswith(("final_layer", "context_embedder")) for path in network.layers)


def test_embedder_ranks_follow_the_order_of_sd_scripts():
    paths = paths_of("sd35-medium")
    ranks = target_ranks(paths, AdapterSpec(rank=4, embedder_ranks=(1, 2, 3, 5, 6, 7)))
    assert len(ranks) == len(paths)
    assert {path: rank for path, rank in ranks.items() if part_of(path) is None} == {
        "context_embedder": 1,
        "t_embedder.mlp.0": 2,
        "t_embedder.mlp.2": 2,
        "x_embedder.proj": 3,
        "y_embedder.mlp.0": 5,
        "y_embedder.mlp.2": 5,
        "final_layer.adaLN_modulation.1": 6,
        "final_layer.linear": 7,
    }
    assert len(EMBEDDERS) == 6


def test_part_ranks_reach_their_part_and_zero_leaves_it_out():
    parts = {"context_attn": 1, "context_mlp": 2, "context_mod": 3, "x_attn": 4, "x_mlp": 5, "x_mod": 0}
    ranks = target_ranks(paths_of("sd35-medium"), AdapterSpec(rank=9, part_ranks=parts))
    assert ranks["joint_blocks.0.x_block.attn2.qkv"] == ranks["joint_blocks.0.x_block.attn.proj"] == 4
    assert ranks["joint_blocks.1.context_block.mlp.fc2"] == 2
    assert ranks["joint_blocks.2.context_block.adaLN_modulation.1"] == 3
    assert "joint_blocks.0.x_block.adaLN_modulation.1" not in ranks
    assert set(ranks.values()) == {1, 2, 3, 4, 5}


def test_blocks_are_chosen_and_checked_against_the_depth():
    ranks = target_ranks(paths_of("sd35-large"), AdapterSpec(blocks="0, 2-2"))
    assert {path.split(".")[1] for path in ranks} == {"0", "2"}
    assert parse_blocks("0,3-5", 38) == {0, 3, 4, 5}
    for wrong in ("0-3", "3", "2-1", "x", "1-", "-1"):
        with pytest.raises(ParameterError, match="train_block_indices"):
            parse_blocks(wrong, 3)
    with pytest.raises(ParameterError, match="nothing to train"):
        target_ranks(paths_of("sd35-large"), AdapterSpec(blocks="none"))


def test_first_rank_rule_wins_over_part_and_block():
    spec = AdapterSpec(
        rank=4, part_ranks={"x_attn": 2}, blocks="1", rank_rules=((r"blocks\.0\.x_block\.attn\.qkv", 7), ("attn2", 0))
    )
    ranks = target_ranks(paths_of("sd35-medium"), spec)
    assert ranks["joint_blocks.0.x_block.attn.qkv"] == 7
    assert ranks["joint_blocks.1.x_block.attn.qkv"] == 2
    assert "joint_blocks.0.x_block.attn.proj" not in ranks
    assert not any("attn2" in path for path in ranks)


@pytest.mark.parametrize("rule", ["blocks.7", "(", "single_blocks"])
def test_rules_that_match_nothing_are_refused(rule):
    with pytest.raises(ParameterError, match="rule"):
        target_ranks(paths_of("sd35-large"), AdapterSpec(rank_rules=((rule, 4),)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"algorithm": "loha", "dropout": DropoutRates(neuron=0.1)},
        {"algorithm": "lokr", "split_qkv": True},
        {"embedder_ranks": (1, 2, 3)},
        {"rank": -1},
        {"rank": 0},
    ],
)
def test_specs_that_cannot_be_are_refused(wrong):
    with pytest.raises(ParameterError):
        check_spec(AdapterSpec(**wrong))
        target_ranks(paths_of("sd35-large"), AdapterSpec(**wrong))


@pytest.mark.parametrize("variant", sorted(REAL))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fresh_adapter_changes_nothing(variant, algorithm):
    model, inputs = tiny_mmdit(variant), random_inputs()
    before = model(**inputs)
    network = attach(model, AdapterSpec(algorithm=algorithm, rank=4, embedder_ranks=(4,) * 6))
    assert len(network.layers) == len(list(model.linears()))
    assert torch.equal(model(**inputs), before)
    disturb(network)
    assert not torch.allclose(model(**inputs), before)
    with network.detached():
        assert torch.equal(model(**inputs), before)
    network.set_multiplier(0.0)
    torch.testing.assert_close(model(**inputs), before)


@pytest.mark.parametrize("algorithm", [name for name in (*ALGORITHMS, "split") if name != "tlora"])
def test_saved_factors_attach_merge_and_load_as_the_same_model(algorithm):
    spec = AdapterSpec(algorithm="lora" if algorithm == "split" else algorithm, rank=4, split_qkv=algorithm == "split",
                       alpha=None if algorithm == "oftv2" else 2.0, embedder_ranks=(2,) * 6)  # fmt: skip
    model, inputs = tiny_mmdit("sd35-medium"), random_inputs()
    network = attach(model, spec)
    disturb(network)
    expected, saved = model(**inputs), network.deltas()
    network.detach()
    again = attach_deltas(model, saved)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    again.detach()
    merge_into(model, saved)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
    fresh = attach(tiny_mmdit("sd35-medium"), spec)
    fresh.load(saved)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_a_dora_exported_for_comfyui_attaches_and_loads_as_it_was_trained():
    model, inputs, spec = tiny_mmdit("sd35-medium"), random_inputs(), AdapterSpec(algorithm="dora", rank=2)
    weights = {path: linear.dense_weight().clone() for path, linear in model.linears()}
    network = attach(model, spec)
    disturb(network)
    expected = model(**inputs)
    exported = {path: delta.suited("comfyui", weights[path]) for path, delta in network.deltas().items()}
    network.detach()
    again = attach_deltas(model, exported)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
    again.detach()
    fresh = attach(model, spec)
    fresh.load(exported)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
    fresh.detach()
    merge_into(model, exported)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_for_text_encoders_alone_is_refused():
    with pytest.raises(InputError, match="text encoders alone"):
        attach_deltas(tiny_mmdit("sd35-medium"), {})


def test_start_values_depend_on_seed_and_path_alone():
    whole = attach(tiny_mmdit("sd35-large"), AdapterSpec(seed=1))
    part = attach(tiny_mmdit("sd35-large"), AdapterSpec(seed=1, part_ranks={"x_attn": 0}, blocks="2"))
    other = attach(tiny_mmdit("sd35-large"), AdapterSpec(seed=2))
    for path, layer in part.layers.items():
        assert torch.equal(layer.down, whole.layers[path].down)
        assert not torch.equal(layer.down, other.layers[path].down)


def test_alpha_is_the_rank_of_each_layer_unless_given():
    parts = {"x_mlp": 2}
    assert {
        layer.setup.scale for layer in attach(tiny_mmdit("sd35-large"), AdapterSpec(part_ranks=parts)).layers.values()
    } == {1.0}
    given = attach(tiny_mmdit("sd35-large"), AdapterSpec(rank=4, part_ranks=parts, alpha=1.0))
    assert {layer.setup.scale for layer in given.layers.values()} == {0.25, 0.5}
    rs = attach(tiny_mmdit("sd35-large"), AdapterSpec(rank=4, alpha=1.0, rs_lora=True))
    assert {layer.setup.scale for layer in rs.layers.values()} == {0.5}


def test_split_qkv_splits_the_fused_layers_alone():
    network = attach(tiny_mmdit("sd35-medium"), AdapterSpec(split_qkv=True))
    assert {path for path, layer in network.layers.items() if isinstance(layer, SplitLoRA)} == {
        path for path in network.layers if path.endswith(".qkv")
    }


def test_parameter_groups_follow_rules_and_loraplus():
    spec = AdapterSpec(learning_rate_rules=((r"joint_blocks\.0\.", 1e-5), ("mlp", 0.0)))
    network = attach(tiny_mmdit("sd35-large"), spec)
    groups = network.parameter_groups(spec, 1e-4, loraplus_lr_ratio=16.0)
    assert {round(group["lr"], 9) for group in groups} == {1e-4, 1.6e-3, 1e-5, 1.6e-4}
    by_rate = {round(group["lr"], 9): {id(p) for p in group["params"]} for group in groups}
    assert id(network.layers["joint_blocks.0.x_block.mlp.fc1"].up) in by_rate[1.6e-4]
    assert id(network.layers["joint_blocks.1.x_block.attn.qkv"].down) in by_rate[1e-4]
    assert not any(id(network.layers["joint_blocks.1.x_block.mlp.fc1"].up) in chosen for chosen in by_rate.values())
    with pytest.raises(ParameterError, match="loraplus"):
        attach(tiny_mmdit("sd35-large"), AdapterSpec(algorithm="loha")).parameter_groups(
            AdapterSpec(algorithm="loha"), 1e-4, loraplus_lr_ratio=2.0
        )


def test_base_model_is_untouched_by_training_and_has_no_new_keys():
    model, inputs = tiny_mmdit("sd35-medium"), random_inputs()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    network = attach(model, AdapterSpec(rank=2))
    disturb(network)
    model(**inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.long
def test_gradients_are_the_same_with_gradient_checkpointing_and_dropout():
    gradients = []
    for seed, kept in enumerate(("all", "attention", "none")):
        model = tiny_mmdit("sd35-medium")
        model.keep_activations([kept] * model.architecture.depth)
        network = attach(model, AdapterSpec(rank=2, dropout=DropoutRates(neuron=0.2, rank=0.2, module=0.2)))
        disturb(network)
        network.set_dropout_keys(torch.tensor([5, 6]))
        torch.manual_seed(seed)  # masks must not come from the global generator
        model(**random_inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for first, *others in zip(*gradients, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_bf16_autocast_trains_fp32_parameters():
    model = tiny_mmdit("sd35-medium", dtype=torch.bfloat16)
    network = attach(model, AdapterSpec(rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        model(**random_inputs()).square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())


def test_an_adapter_of_another_model_or_shape_is_refused():
    large, medium = tiny_mmdit("sd35-large", depth=2), tiny_mmdit("sd35-medium")
    saved = attach(medium, AdapterSpec(rank=2)).deltas()
    with pytest.raises(InputError, match="does not fit the model"):
        attach_deltas(large, saved)
    network = attach(tiny_mmdit("sd35-medium"), AdapterSpec(rank=2, blocks="0"))
    with pytest.raises(InputError, match="has more joint_blocks"):
        network.load(saved)
    with pytest.raises(InputError, match="rank"):
        attach(tiny_mmdit("sd35-medium"), AdapterSpec(rank=3)).load(saved)


def test_norm_limits_count_and_average():
    network = attach(tiny_mmdit("sd35-large"), AdapterSpec(rank=2))
    count, mean = network.limit_norms(1.0)
    assert count == 0 and mean == 0.0
    disturb(network, size=1.0)
    count, mean = network.limit_norms(1.0)
    assert count == len(network.layers) and mean == 1.0


def test_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdapterSpec().rank = 3


def test_factors_on_the_cpu_are_the_layers_own_memory():
    network = attach(tiny_mmdit("sd35-medium"), AdapterSpec(rank=2))
    own = {parameter.data_ptr() for parameter in network.parameters()}
    given = {tensor.data_ptr() for delta in network.deltas().values() for tensor in delta.tensors().values()}
    assert given == own
