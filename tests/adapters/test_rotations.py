"""OFT and OFTv2: each form acts by its readers' own definition, in fp64, and as peft's own layer."""

# I in features, O out features, K blocks, N width of a block

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import OFTConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.comparing import relative_error
from support.diffusers_mmdit import diffusers_mmdit
from support.random_adapters import random_adapter, random_delta
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit
from torch import nn

from sd3pipe.adapters.algebra import merge, resize
from sd3pipe.adapters.apart import Apart
from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.forms import parse
from sd3pipe.adapters.full import FullDelta
from sd3pipe.adapters.fusing import rows_of_part, swapped_halves
from sd3pipe.adapters.network import attach, attach_deltas
from sd3pipe.adapters.oft import OFTDelta
from sd3pipe.adapters.oftv2 import OFTv2Delta
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.weights import block_width
from sd3pipe.errors import InputError, ParameterError

WIDTH = 192
EXACT = 1e-6  # of fp32 factors against a closed form in fp64
QKV = "joint_blocks.0.x_block.attn.qkv"


def draw(*shape, seed=0, scale=0.2):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def comfyui(weight_OI, blocks_KNN, alpha):
    """The weight as ComfyUI turns it: rows by the transposed R, the norm of all Q bounded by alpha above 0."""
    weight_OI, blocks_KNN = weight_OI.double(), blocks_KNN.double()
    q = blocks_KNN - blocks_KNN.transpose(1, 2)
    norm = torch.norm(q) + 1e-8
    if alpha > 0 and norm > alpha:
        q = q * alpha / norm
    one = torch.eye(q.shape[1], dtype=torch.float64)
    r = (one + q) @ torch.linalg.inv(one - q)
    parts = weight_OI.view(*q.shape[:2], -1)
    return torch.einsum("knm,kni->kmi", r, parts).reshape(weight_OI.shape)


def peft_rotation(upper_KE, width, *, exact):
    """R of each block by peft's definition."""
    rotations = []
    for upper_E in upper_KE.double():
        q = torch.zeros(width, width, dtype=torch.float64)
        q[tuple(torch.triu_indices(width, width, 1))] = upper_E
        q = q - q.T
        one = torch.eye(width, dtype=torch.float64)
        series = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        rotations.append((one - q) @ torch.linalg.inv(one + q) if exact else series)
    return torch.block_diag(*rotations)


@pytest.mark.parametrize("alpha", [None, 0.0, 3.0, 1e6])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_blocks_turn_outputs_as_comfyui_does(tmp_path, alpha, prefix):
    blocks, weight = draw(3 * WIDTH // 16, 16, 16), draw(3 * WIDTH, WIDTH, seed=1)
    name = QKV.replace(".", "_") if prefix == "lora_unet_" else QKV
    tensors = {f"{prefix}{name}.oft_blocks": blocks}
    save_file(
        tensors | ({} if alpha is None else {f"{prefix}{name}.alpha": torch.tensor(alpha)}), tmp_path / "a.safetensors"
    )
    delta = read_adapter(tmp_path / "a.safetensors").adapter[QKV]
    expected = comfyui(weight, blocks, alpha or 0.0)
    assert relative_error(delta.merged(weight).double(), expected) < EXACT
    assert relative_error(weight.double(), expected) > 0.1
    assert torch.equal(comfyui(weight, blocks, 3.0), comfyui(weight, blocks, 0.0)) is False
    for index in range(3):
        rows = rows_of_part(index)
        assert relative_error(delta.merged(rows(weight), rows=rows).double(), rows(expected)) < EXACT


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic"])
def test_a_trained_oft_is_written_for_comfyui_as_it_acts(tmp_path, form):
    model = tiny_mmdit("sd35-medium")
    spec = AdapterSpec(algorithm="oft", rank=8, alpha=0.4)
    network = attach(model, spec)
    for layer in network.layers.values():
        nn.init.normal_(layer.blocks, std=0.1, generator=torch.Generator().manual_seed(0))
    weights = {path: slot.dense_weight() for path, slot in model.linears() if path in network.layers}
    save_adapter(tmp_path / "a.safetensors", network.deltas(), form=form)
    tensors = load_file(tmp_path / "a.safetensors")
    merged = tiny_mmdit("sd35-medium")
    for path, slot in merged.linears():
        name = "lora_unet_" + path.replace(".", "_") if form == "comfyui" else "diffusion_model." + path
        if path in weights:
            turned = comfyui(weights[path], tensors[f"{name}.oft_blocks"], tensors[f"{name}.alpha"].item())
            slot.weight.data.copy_(turned.view_as(slot.weight))
    assert {tensor.shape[1] for key, tensor in tensors.items() if key.endswith("oft_blocks")} == {8}
    inputs = random_inputs()
    torch.testing.assert_close(model(**inputs), merged(**inputs), rtol=1e-4, atol=1e-4)  # fp32 sums in another order
    assert compare(network.deltas(), read_adapter(tmp_path / "a.safetensors").adapter)[0] == 0.0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_entries_turn_inputs_as_peft_and_onetrainer_do(exact, scaled):
    upper, weight = draw(WIDTH // 8, 28), draw(WIDTH, WIDTH, seed=1)
    names = {"oft_R.weight": upper} | ({"oft_R.scaled_oft": torch.tensor(True)} if scaled else {})
    tensors = {f"lora_transformer_transformer_blocks_0_attn_to_out_0.{end}": tensor for end, tensor in names.items()}
    notes = {"sd3pipe_oft_cayley": "exact"} if exact else {}
    (delta,) = parse(tensors, metadata=notes).adapter.values()
    unit = 2 * math.sqrt(7) if scaled else 1.0
    rotation = peft_rotation(upper / unit, 8, exact=exact)
    expected = (rotation @ weight.double().T).T
    assert relative_error(delta.merged(weight).double(), expected) < EXACT
    assert relative_error(weight.double(), expected) > 0.1
    assert torch.allclose(delta.dense(torch.float64) + torch.eye(WIDTH), rotation, rtol=0, atol=1e-7)  # fp32 division


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_that_turns_inputs_equals_pefts(exact):
    generator = torch.Generator().manual_seed(0)
    delta = random_delta("exact oftv2" if exact else "oftv2", (36, 24), rank=4, alpha=1.0, generator=generator)
    model = nn.Sequential(nn.Linear(24, 36)).double()
    weight, x = model[0].weight.detach().clone(), torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    width = delta.rank
    config = OFTConfig(oft_block_size=width, use_cayley_neumann=not exact, target_modules=["0"])
    inject_adapter_in_model(config, model)
    rotation = model[0].oft_R["default"]
    rotation.to(torch.float64)
    with torch.no_grad():
        rotation.weight.copy_(delta.upper)
    ours = x + x @ delta.dense(torch.float64)
    expected = nn.functional.linear(ours, weight, model[0].base_layer.bias)
    assert relative_error(model(x), expected) < EXACT
    merged = (model[0].get_delta_weight("default") @ weight.T).T
    assert relative_error(delta.merged(weight.float()).double(), merged) < EXACT


@pytest.mark.parametrize("kind", ["oftv2", "exact oftv2"])
def test_peft_predicts_the_same_with_the_exported_file(tmp_path, kind):
    adapter, inputs = random_adapter(tiny_architecture("sd35-medium"), kind, embedders=False), random_inputs()
    adapter = {path: delta for path, delta in adapter.items() if delta.rank == 4}
    save_adapter(tmp_path / "a.safetensors", adapter, form="diffusers")
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(tmp_path / "a.safetensors").items()}
    oracle = diffusers_mmdit("sd35-medium", torch.float32)
    targets = sorted({key.split(".oft_R")[0] for key in tensors})
    config = OFTConfig(oft_block_size=4, use_cayley_neumann=kind == "oftv2", target_modules=targets)
    model = get_peft_model(oracle, config)
    result = set_peft_model_state_dict(model, {f"base_model.model.{key}": t for key, t in tensors.items()})
    assert not result.unexpected_keys and len(tensors) > 10
    ours = tiny_mmdit("sd35-medium")
    before = ours(**inputs)
    attach_deltas(ours, adapter)
    prediction = model(
        hidden_states=inputs["latents_BChw"], timestep=inputs["timesteps_B"], return_dict=False,
        encoder_hidden_states=inputs["context_BLD"], pooled_projections=inputs["pooled_BP"],
    )[0]  # fmt: skip
    assert relative_error(ours(**inputs), prediction) < 1e-4  # as LoRA's against diffusers, in fp32
    assert relative_error(before, prediction) > 0.05
    assert compare(adapter, read_adapter(tmp_path / "a.safetensors").adapter)[0] == 0.0


def test_turns_of_q_k_and_v_join_where_one_turn_does_it():
    def named(parts):
        return {f"lycoris_transformer_blocks_0_attn_to_{part}.{end}": t for part, (end, t) in parts.items()}

    outputs = {part: ("oft_blocks", draw(24, 8, 8, seed=i)) for i, part in enumerate("qk")}
    (joined,) = parse(named(outputs)).adapter.values()
    assert isinstance(joined, OFTDelta) and torch.equal(joined.blocks[48:], torch.zeros(24, 8, 8))
    same = {part: ("oft_R.weight", draw(24, 28)) for part in "qkv"}
    (joined,) = parse(named(same)).adapter.values()
    assert isinstance(joined, OFTv2Delta)
    weight = draw(3 * WIDTH, WIDTH)
    for parts in (same | {"k": ("oft_R.weight", draw(24, 28, seed=1))}, {"q": same["q"], "v": same["v"]}):
        (apart,) = parse(named(parts)).adapter.values()
        assert isinstance(apart, Apart)
        thirds = weight.double().chunk(3)
        turned = [
            third @ peft_rotation(parts[part][1], 8, exact=False).T if part in parts else third
            for part, third in zip("qkv", thirds, strict=True)
        ]
        assert relative_error(apart.merged(weight).double(), torch.cat(turned)) < EXACT


def test_a_constraint_of_the_whole_layer_holds_for_its_rows():
    delta = OFTDelta(blocks=draw(24, 8, 8), alpha=2.0)
    weight = draw(WIDTH, WIDTH, seed=1)
    swapped = delta.with_rows(swapped_halves)
    expected = swapped_halves(comfyui(weight, delta.blocks, 2.0))
    assert relative_error(swapped.merged(swapped_halves(weight)).double(), expected) < EXACT
    with pytest.raises(InputError, match="blocks of 24 rows cannot be taken apart"):
        OFTDelta(blocks=draw(4, 24, 24), alpha=0.0).with_rows(rows_of_part(0))  # 96 rows in thirds of 32


@pytest.mark.parametrize(
    ("features", "largest", "width"), [(2432, 16, 16), (2432, 64, 64), (2432, 30, 19), (7, 3, 1), (64, 100, 64)]
)
def test_blocks_are_as_wide_as_they_may_be(features, largest, width):
    assert block_width(features, largest) == width


@pytest.mark.parametrize("algorithm", ["oft", "oftv2"])
def test_blocks_never_reach_from_q_into_k(algorithm):
    network = attach(tiny_mmdit("sd35-medium"), AdapterSpec(algorithm=algorithm, rank=144))
    width = network.deltas()[QKV].rank
    assert width == 96 and network.layers[QKV].setup.alpha == (0.0 if algorithm == "oft" else 144.0)


@pytest.mark.parametrize("kind", ["oft", "oftv2"])
def test_what_rotations_cannot_do_is_said_in_a_line(tmp_path, kind):
    adapter = random_adapter(tiny_architecture("sd35-medium"), kind)
    with pytest.raises(ParameterError, match="cannot be weighted: half a turn is no rotation"):
        merge([adapter], [0.5])
    with pytest.raises(ParameterError, match="that depends on the base cannot be resized: export it"):
        resize(adapter[QKV], rank=4, energy=None)
    assert merge([adapter], [1.0]).keys() == adapter.keys()
    assert adapter[QKV].difference(replace(adapter[QKV], alpha=2.5)) >= 0.0
    if kind == "oft":
        with pytest.raises(ParameterError, match="diffusers has no form for oft, since peft turns inputs"):
            save_adapter(tmp_path / "a.safetensors", adapter, form="diffusers")
    else:
        weight = draw(3 * WIDTH, WIDTH)
        full = adapter[QKV].suited("comfyui", weight)
        assert isinstance(full, FullDelta) and not adapter[QKV].suits("comfyui")
        torch.testing.assert_close(full.diff, adapter[QKV].change(weight))


PEFT = {"peft_type": "OFT", "oft_block_size": 8, "peft_version": "0.18.1"}


@pytest.mark.parametrize(
    ("config", "exact"),
    [({"use_cayley_neumann": False, "peft_version": "0.17.0"}, True), ({"use_cayley_neumann": True}, False)],
)
def test_pefts_configuration_says_which_formula(tmp_path, config, exact):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.transformer_blocks.0.attn.to_out.0.oft_R.weight": draw(24, 28)}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | config))
    (delta,) = read_adapter(path).adapter.values()
    assert isinstance(delta, OFTv2Delta) and delta.exact == exact


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"coft": True}, "coft = true, which projects"),
        ({"block_share": True}, "block_share = true, one rotation"),
        ({"num_cayley_neumann_terms": 7}, "num_cayley_neumann_terms = 7"),
        ({"peft_version": "0.17.1"}, "a peft_version before 0.18"),
        ({"peft_version": ""}, "a peft_version before 0.18"),
    ],
)
def test_an_oft_of_peft_that_acts_otherwise_is_refused(tmp_path, config, told):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.transformer_blocks.0.attn.to_out.0.oft_R.weight": draw(24, 28)}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | config))
    with pytest.raises(InputError, match=told):
        read_adapter(path)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"oft_R.weight": draw(1, 28)}, "block_share"),
        ({"oft_R.weight": draw(24, 27)}, "no entries above the diagonals"),
        ({"oft_blocks": draw(24, 8, 7)}, "no set of square ones"),
        ({"oft_blocks": draw(24, 8, 8), "dora_scale": draw(WIDTH, 1)}, "make no adapter layer of a known kind"),
    ],
)
def test_rotations_that_are_none_are_refused(tensors, told):
    with pytest.raises(InputError, match=told):
        parse({f"lycoris_transformer_blocks_0_attn_to_out_0.{end}": tensor for end, tensor in tensors.items()})


def test_the_model_is_told_by_one_side_of_its_layers():
    for variant in ("sd3-medium", "sd35-medium", "sd35-large"):
        architecture = tiny_architecture(variant)
        for kind in ("oft", "oftv2"):
            adapter = random_adapter(architecture, kind, embedders=False)
            attach_deltas(tiny_mmdit(variant), adapter)
    other = random_adapter(tiny_architecture("sd35-medium", depth=4), "oft")
    with pytest.raises(InputError, match="does not fit the model"):
        attach_deltas(tiny_mmdit("sd35-medium"), other)
