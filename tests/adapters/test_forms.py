"""Forms of adapter files: round trips over all of them, foreign names, what other programs find in them."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.random_adapters import random_adapter, random_delta
from support.tiny_mmdit import tiny_architecture

from sd3pipe.adapters.apart import join_qkv
from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.forms import parse, prepared, tensors_of
from sd3pipe.adapters.keymap import (
    BLOCK_MODULES,
    OTHER_MODULES,
    WRITTEN_FORMS,
    NativeModule,
    find_native_module,
    halves_swapped,
    module_names,
)  # fmt: skip
from sd3pipe.errors import ParameterError

VARIANTS = ("sd3-medium", "sd35-medium", "sd35-large")
KINDS = (
    "lora", "dora", "loha", "lokr", "dora over loha", "dora over lokr", "dora of columns", "full", "oft", "oftv2",
    "exact oftv2", "tlora",
)  # fmt: skip
TEXT_MODULES = (
    "text_encoders.clip_l.transformer.text_model.encoder.layers.11.self_attn.out_proj",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_g.transformer.text_projection",
    "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q",
    "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_1",
)


def converted(adapter, form):
    """The adapter after one trip through the tensors of a form, with the metadata that they need."""
    held = prepared(adapter, form)
    notes = {key: note for delta in held.values() for key, note in delta.notes().items()}
    return parse(tensors_of(held, form), metadata=notes).adapter


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", WRITTEN_FORMS)
@pytest.mark.parametrize("second", WRITTEN_FORMS)
@pytest.mark.parametrize("every", [1, 4])
def test_any_two_forms_in_turn_keep_the_effective_change(variant, first, second, every):
    adapter = random_adapter(tiny_architecture(variant), every=every)
    back = converted(converted(converted(adapter, first), second), "comfyui")
    error, where = compare(adapter, back)
    assert error <= (1e-6 if "diffusers" in (first, second) else 0.0), where


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_forms_hold_every_kind_bit_for_bit(form, kind):
    adapter = random_adapter(tiny_architecture("sd35-medium"), kind)
    assert compare(adapter, converted(adapter, form)) == (0.0, next(iter(adapter)))


def test_diffusers_form_holds_dora_and_refuses_the_rest():
    dora = random_adapter(tiny_architecture("sd35-medium"), "dora")
    assert compare(dora, converted(dora, "diffusers"))[0] < 1e-6
    for kind in KINDS:
        if kind not in ("lora", "dora", "oftv2", "exact oftv2"):
            with pytest.raises(ParameterError, match="diffusers has no form for"):
                prepared(random_adapter(tiny_architecture("sd3-medium"), kind), "diffusers")


@pytest.mark.parametrize("kind", ["oftv2", "exact oftv2"])
def test_diffusers_form_holds_turned_inputs_bit_for_bit(kind):
    adapter = random_adapter(tiny_architecture("sd35-medium"), kind)
    assert compare(adapter, converted(adapter, "diffusers"))[0] == 0.0


def test_split_of_one_down_and_of_three_is_exact():
    generator = torch.Generator().manual_seed(0)
    shared = random_delta("lora", (192, 64), rank=4, alpha=3.0, generator=generator)
    assert {part.rank for part in shared.split().values()} == {4}
    assert shared.difference(join_qkv(shared.split())) == 0.0
    apart = {i: random_delta("lora", (64, 64), rank=2, alpha=1.0, generator=generator) for i in range(3)}
    joined = join_qkv(apart)
    assert (joined.rank, joined.alpha) == (6, 3.0)
    for index, part in joined.split().items():
        assert apart[index].difference(part) == 0.0


def test_parts_of_other_ranks_and_strengths_join():
    generator = torch.Generator().manual_seed(0)
    parts = {i: random_delta("lora", (64, 64), rank=i + 1, alpha=2.0, generator=generator) for i in range(3)}
    dense = torch.cat([part.dense() for part in parts.values()])
    torch.testing.assert_close(join_qkv(parts).dense(), dense)
    del parts[1]
    dense[64:128] = 0
    joined = join_qkv(parts)
    assert joined.rank == 4
    torch.testing.assert_close(joined.dense(), dense)


def test_parts_of_a_loha_join():
    generator = torch.Generator().manual_seed(0)
    parts = {i: random_delta("loha", (64, 32), rank=i + 1, alpha=2.0, generator=generator) for i in range(3)}
    torch.testing.assert_close(join_qkv(parts).dense(), torch.cat([part.dense() for part in parts.values()]))


def test_diffusers_swaps_halves_of_two_modulations():
    architecture = tiny_architecture("sd35-medium")
    adapter = random_adapter(architecture)
    tensors = tensors_of(prepared(adapter, "diffusers"), "diffusers")
    swapped = {path for path in adapter if halves_swapped(path, architecture.depth)}
    assert swapped == {"final_layer.adaLN_modulation.1", "joint_blocks.2.context_block.adaLN_modulation.1"}
    for path in swapped | {"joint_blocks.1.context_block.adaLN_modulation.1"}:
        (name,) = module_names(path, "diffusers")
        written = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        expected = adapter[path].dense()
        if path in swapped:
            expected = torch.cat(expected.chunk(2)[::-1])
        torch.testing.assert_close(written, expected)


# --- an independent statement of what ComfyUI looks for, from the reference page alone ---

COMFY_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_q": ("x_block.attn.qkv", 0), "attn.to_k": ("x_block.attn.qkv", 1), "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0), "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0), "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
COMFY_TOP = {
    "context_embedder": "context_embedder", "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip


def comfy_key_map(weights, depth):
    """Module name in a file -> (weight, row offset or None, halves swapped)."""
    keys = {}
    for weight in weights:
        keys["lora_unet_" + weight.replace(".", "_")] = (weight, None, False)
        keys["diffusion_model." + weight] = (weight, None, False)
    diffusers = {name: (weight, None, weight.endswith("adaLN_modulation.1")) for name, weight in COMFY_TOP.items()}
    for block in range(depth):
        for name, target in COMFY_BLOCK.items():
            weight, part = target if isinstance(target, tuple) else (target, None)
            offset = None if part is None else part * 64 * depth
            swapped = name == "norm1_context.linear" and block == depth - 1
            diffusers[f"transformer_blocks.{block}.{name}"] = (f"joint_blocks.{block}.{weight}", offset, swapped)
    for name, (weight, offset, swapped) in diffusers.items():
        if weight in weights:
            keys["transformer." + name] = (weight, offset, swapped)
            keys["base_model.model." + name] = (weight, offset, swapped)
            keys["lora_transformer_" + name.replace(".", "_")] = (weight, offset, swapped)
            keys["lycoris_" + name.replace(".", "_")] = (weight, offset, swapped)
    return keys


def comfy_deltas(tensors, sizes, depth):
    """The change of every weight as ComfyUI computes it, and the keys that it did not use."""
    deltas, used = {}, set()
    for name, (weight, offset, swapped) in comfy_key_map(sizes, depth).items():
        for up_name, down_name in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            if name + up_name not in tensors:
                continue
            up, down = tensors[name + up_name].flatten(1), tensors[name + down_name].flatten(1)
            used |= {name + up_name, name + down_name}
            alpha = tensors.get(f"{name}.alpha")
            used |= {f"{name}.alpha"} if alpha is not None else set()
            change = up.float() @ down.float() * (1.0 if alpha is None else alpha.item() / down.shape[0])
            change = torch.cat(change.chunk(2)[::-1]) if swapped else change
            whole = deltas.setdefault(weight, torch.zeros(sizes[weight]))
            start = offset or 0
            whole[start : start + change.shape[0]] += change
    return deltas, set(tensors) - used


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", WRITTEN_FORMS)
def test_comfyui_finds_every_key_and_the_same_change(tmp_path, variant, form):
    architecture = tiny_architecture(variant)
    adapter = random_adapter(architecture)
    save_adapter(tmp_path / "a.safetensors", adapter, form=form)
    tensors = load_file(tmp_path / "a.safetensors")
    deltas, unused = comfy_deltas(tensors, architecture.linear_sizes(), architecture.depth)
    assert unused == set()
    assert deltas.keys() == adapter.keys()
    for path, delta in adapter.items():
        torch.testing.assert_close(deltas[path], delta.dense(), rtol=1e-5, atol=1e-6)


def renamed(tensors, prefix, *, underscored, up, down):
    """diffusers tensors under the names of another program."""
    result = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("transformer.").partition(".lora_")
        name = name.replace(".", "_") if underscored else name
        result[prefix + name + (up if part.startswith("B") else down)] = tensor
    return result


FOREIGN_FORMS = {
    "onetrainer": ("lora_transformer_", True, ".lora_up.weight", ".lora_down.weight"),
    "lycoris": ("lycoris_", True, ".lora_up.weight", ".lora_down.weight"),
    "diffusers": ("base_model.model.", False, ".lora_B.weight", ".lora_A.weight"),
    "diffusers, old": ("transformer.", False, ".lora.up.weight", ".lora.down.weight"),
    "diffusers, linear": ("transformer.", False, ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "diffusers, named": ("transformer.", False, ".lora_B.default.weight", ".lora_A.default.weight"),
    "diffusers, bare": ("", False, ".lora_B.weight", ".lora_A.weight"),
}


@pytest.mark.parametrize("name", FOREIGN_FORMS)
def test_names_of_other_programs_are_read(name):
    prefix, underscored, up, down = FOREIGN_FORMS[name]
    architecture = tiny_architecture("sd35-medium")
    adapter = random_adapter(architecture)
    tensors = renamed(
        tensors_of(prepared(adapter, "diffusers"), "diffusers"), prefix, underscored=underscored, up=up, down=down
    )
    parsed = parse(tensors)
    assert parsed.forms == {name.partition(",")[0]}
    assert parsed.unknown == []
    assert compare(adapter, parsed.adapter)[0] < 1e-6
    if not re.search(r"\.lora\.|linear|default|^transformer_blocks", next(iter(tensors))) and prefix:
        deltas, unused = comfy_deltas(tensors, architecture.linear_sizes(), architecture.depth)
        assert unused == set() and deltas.keys() == adapter.keys()


def with_alpha(tensors):
    """The same changes, half of their strength in the factors and the other half in an alpha of twice the rank."""
    halved = {key: tensor / 2 if key.endswith("lora_up.weight") else tensor for key, tensor in tensors.items()}
    alphas = {
        key.replace("lora_down.weight", "alpha"): torch.tensor(2.0 * tensor.shape[0])
        for key, tensor in tensors.items()
        if key.endswith("lora_down.weight")
    }
    return halved | alphas


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FOREIGN_FORMS)
@pytest.mark.parametrize("every", [1, 3])
def test_every_form_of_others_becomes_each_of_ours(variant, name, every):
    prefix, underscored, up, down = FOREIGN_FORMS[name]
    adapter = random_adapter(tiny_architecture(variant), every=every)
    theirs = tensors_of(prepared(adapter, "diffusers"), "diffusers")
    tensors = renamed(theirs, prefix, underscored=underscored, up=up, down=down)
    read = parse(with_alpha(tensors) if underscored else tensors)
    assert read.unknown == [] and compare(adapter, read.adapter)[0] < 1e-6
    for form in WRITTEN_FORMS:
        assert compare(read.adapter, converted(read.adapter, form))[0] < (1e-30 if form != "diffusers" else 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", WRITTEN_FORMS)
@pytest.mark.parametrize("second", WRITTEN_FORMS)
def test_strengths_that_are_powers_of_two_pass_exactly(variant, first, second):
    adapter = {
        path: replace(delta, alpha=delta.rank / 4) for path, delta in random_adapter(tiny_architecture(variant)).items()
    }
    assert compare(adapter, converted(converted(converted(adapter, first), second), "comfyui"))[0] == 0.0


def test_onetrainer_alpha_counts_and_a_missing_alpha_is_the_rank():
    down, up = torch.randn(4, 192), torch.randn(192, 4)
    name = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    pair = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    for extra, scale in (({}, 1.0), ({f"{name}.alpha": torch.tensor(1.0)}, 0.25)):
        (delta,) = parse(pair | extra).adapter.values()
        torch.testing.assert_close(delta.dense(), scale * up @ down)


def test_strength_of_diffusers_own_metadata_is_honoured(tmp_path):
    tensors = {}
    for block, rank in ((0, 4), (1, 2)):
        tensors[f"transformer.transformer_blocks.{block}.attn.to_out.0.lora_A.weight"] = torch.randn(rank, 192)
        tensors[f"transformer.transformer_blocks.{block}.attn.to_out.0.lora_B.weight"] = torch.randn(192, rank)
    config = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.rank_pattern": {"1.attn.to_out.0": 2},
              "transformer.alpha_pattern": {"1.attn.to_out.0": 6}}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    adapter = read_adapter(tmp_path / "a.safetensors").adapter
    assert [delta.scale for delta in adapter.values()] == [0.5, 3.0]


def test_a_lokr_of_another_program_is_read():
    generator = torch.Generator().manual_seed(0)
    delta = random_delta("lokr", (192, 192), rank=2, alpha=1.0, generator=generator)
    name = "lycoris_transformer_blocks_0_attn_to_out_0"
    tensors = {f"{name}.lokr_{part}": tensor for part, tensor in delta.tensors().items()}
    (read,) = parse(tensors | {f"{name}.alpha": torch.tensor(1.0)}).adapter.values()
    assert delta.difference(read) == 0.0


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic"])
def test_text_encoder_layers_travel_along(form):
    generator = torch.Generator().manual_seed(0)
    adapter = {path: random_delta("lora", (64, 64), rank=2, alpha=1.0, generator=generator) for path in TEXT_MODULES}
    assert compare(adapter, converted(adapter, form))[0] == 0.0
    clips = {path: delta for path, delta in adapter.items() if "t5" not in path}
    assert compare(clips, converted(clips, "diffusers"))[0] < 1e-6
    with pytest.raises(ParameterError, match="T5"):
        prepared(adapter, "diffusers")


def test_text_encoder_layers_are_not_dropped_in_silence(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    paths = (TEXT_MODULES[0], "joint_blocks.0.x_block.attn.proj")
    adapter = {path: random_delta("lora", (192, 192), rank=2, alpha=1.0, generator=generator) for path in paths}
    save_adapter(tmp_path / "a.safetensors", adapter)
    assert read_adapter(tmp_path / "a.safetensors").model_part.keys() == {paths[1]}
    assert "1 layers of text encoders are left out" in caplog.text


def test_sd_scripts_finds_a_name_rank_and_alpha_for_every_layer(tmp_path):
    """Its loader asks for lora_unet_ names with underscores alone, ranks from lora_down, and fails without an alpha."""
    adapter = random_adapter(tiny_architecture("sd35-medium"))
    save_adapter(tmp_path / "a.safetensors", adapter)
    tensors = load_file(tmp_path / "a.safetensors")
    names = {f"lora_unet_{path}".replace(".", "_"): delta for path, delta in adapter.items()}
    assert tensors.keys() == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    for name, delta in names.items():
        assert tensors[f"{name}.lora_down.weight"].size(0) == delta.rank
        assert tensors[f"{name}.alpha"].item() == 1.5 and tensors[f"{name}.alpha"].ndim == 0
    assert tensors["lora_unet_x_embedder_proj.lora_down.weight"].shape[1:] == (16, 2, 2)


# --- the key maps are bijections ---

native_paths = st.one_of(
    st.sampled_from(sorted(OTHER_MODULES)),
    st.builds("joint_blocks.{}.{}".format, st.integers(0, 999), st.sampled_from(sorted(BLOCK_MODULES))),
    st.sampled_from(TEXT_MODULES),
)


@settings(max_examples=300, deadline=None)
@given(path=native_paths, form=st.sampled_from(WRITTEN_FORMS))
def test_every_module_has_names_of_its_own_that_lead_back(path, form):
    if form == "diffusers" and "t5xxl" in path:
        return
    names = module_names(path, form)
    places = [find_native_module(name) for name in names]
    parts = (None,) if len(names) == 1 else range(3)
    assert places == [NativeModule(form, path, part) for part in parts]


@settings(max_examples=200, deadline=None)
@given(first=native_paths, second=native_paths, form=st.sampled_from(["comfyui", "comfyui-generic"]))
def test_two_modules_never_share_a_name(first, second, form):
    assert (module_names(first, form) == module_names(second, form)) == (first == second)


@settings(max_examples=300, deadline=None)
@given(name=st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.0123456789", max_size=60))
@example(name="proj_out")  # diffusers' names also come without their prefix
@example(name="transformer.proj_outs")
def test_a_text_stands_for_a_module_only_if_it_is_its_name(name):
    place = find_native_module(name)
    if place is not None and place.form != "native":
        assert f"transformer.{name.removeprefix('transformer.')}" in module_names(place.path, place.form)
