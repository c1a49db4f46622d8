"""From options to an adapter: what is trained, how fast, and what the base already carries."""

import pytest
import torch
from support.tiny_mmdit import tiny_mmdit
from support.tiny_training import Inputs, make_inputs, pictures

from sd3pipe.adapters.targets import part_of, target_ranks
from sd3pipe.errors import ParameterError
from sd3pipe.rules.adapter import AdapterRules
from sd3pipe.training.adapter_options import adapter_spec, loraplus_ratio


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("adapter-options"), pictures(3), max_train_steps=2)


def test_network_args_have_sd_scripts_keys_and_meanings():
    spec = adapter_spec(
        AdapterRules(
            network_dim=8,
            network_alpha=0,
            network_dropout=0.1,
            network_args=(
                "context_attn_dim=2", "x_mlp_dim=0", "emb_dims=[1,2,3,4,5,6]", "train_block_indices=0,3-5",
                "split_qkv=True", "rank_dropout=0.2", "module_dropout=0.3", "rs_lora=true",
            ),
            rank_rules=(r"blocks\.0=4",),
            lr_rules=(r"x=1e-5", r"a=b=2"),
        ),
        seed=42,
    )  # fmt: skip
    assert spec.part_ranks == {"context_attn": 2, "x_mlp": 0}
    assert spec.embedder_ranks == (1, 2, 3, 4, 5, 6)
    assert (spec.blocks, spec.split_qkv, spec.rs_lora) == ("0,3-5", True, True)
    assert (spec.dropout.neuron, spec.dropout.rank, spec.dropout.module) == (0.1, 0.2, 0.3)
    assert spec.alpha is None  # 0 means the rank, as in sd-scripts
    assert spec.rank_rules == ((r"blocks\.0", 4),)
    assert spec.learning_rate_rules == (("x", 1e-5), ("a=b", 2.0))


@pytest.mark.parametrize(("layers", "args", "parts"), [
    ("all", (), {"context_attn", "context_mlp", "context_mod", "x_attn", "x_mlp", "x_mod"}),
    ("attention", (), {"context_attn", "x_attn"}),
    ("attention+mlp", (), {"context_attn", "context_mlp", "x_attn", "x_mlp"}),
    ("x_attn + modulation", (), {"x_attn", "context_mod", "x_mod"}),
    ("attention", ("x_mlp_dim=2", "context_attn_dim=0"), {"x_attn", "x_mlp"}),
])  # fmt: skip
def test_train_layers_choose_parts_of_the_blocks(layers, args, parts):
    spec = adapter_spec(AdapterRules(train_layers=layers, network_args=args), seed=42)
    paths = [path for path, _ in tiny_mmdit("sd35-medium").linears()]
    assert {part_of(path) for path in target_ranks(paths, spec)} == parts


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(ParameterError, match="'attn' is none of all, attention, mlp"):
        adapter_spec(AdapterRules(train_layers="attention+attn"), seed=42)


@pytest.mark.parametrize("rule", ["attn", "=4", "attn=four"])
def test_a_rule_without_pattern_or_number_is_refused(rule):
    with pytest.raises(ParameterError, match="write PATTERN=VALUE"):
        adapter_spec(AdapterRules(rank_rules=(rule,)), seed=42)


def test_loraplus_trains_up_faster(inputs):
    assert loraplus_ratio(AdapterRules(network_args=("loraplus_lr_ratio=16",))) == 16
    options = {"max_train_steps": 1, "max_grad_norm": 0.0, "optimizer_args": ("weight_decay=0.0",)}
    plain = inputs.train("plain", **options).adapter()
    plus = inputs.train("plus", network_args=("loraplus_lr_ratio=16",), **options).adapter()
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    ratio = plus[f"{name}.lora_up.weight"].norm() / plain[f"{name}.lora_up.weight"].norm()
    assert float(ratio) == pytest.approx(16, rel=1e-3)  # Adam's first step is the learning rate
    assert torch.equal(plus[f"{name}.lora_down.weight"], plain[f"{name}.lora_down.weight"])


@pytest.mark.long
def test_base_weights_are_in_the_base_at_their_strength(inputs):
    """The first loss is that of the base with the merged adapter; strength 0 is the base alone."""
    teacher = inputs.train("teacher", max_train_steps=4, learning_rate=0.1)
    first = {
        strength: inputs.train(
            f"merged-{strength}", base_weights=(teacher.folder,), base_weights_multiplier=(strength,)
        ).losses()[0]
        for strength in (0.0, 1.0)
    }
    assert first[0.0] == inputs.train("unmerged").losses()[0]
    assert first[1.0] != first[0.0]
    same = inputs.train("default", base_weights=(teacher.folder,)).losses()[0]
    continued = inputs.train("continued", network_weights=teacher.folder).losses()[0]
    assert same == first[1.0]
    assert continued == pytest.approx(first[1.0], rel=1e-5)  # merged or beside the base: one sum in another order


def test_a_part_without_rank_is_not_in_the_file(inputs):
    names = inputs.train("parts", network_args=("x_mlp_dim=0", "train_block_indices=1")).adapter()
    assert all("_joint_blocks_1_" in name for name in names)
    assert not any("x_block_mlp" in name for name in names)
