"""What cannot be used is refused in one line that says what it is, where, and the way out."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_parts import PREFIXES, save_part, save_single_file

from sd3pipe.errors import ExitCode, InputError
from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.models.sources import find_component


def _refusal(component, model, file=None):
    with pytest.raises(InputError) as error:
        find_component(component, model=model, file=file)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == ExitCode.INPUT
    return message


def _named(path, *names):
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_by_name_with_reason_and_way_out(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(2)}, path)
    message = _refusal("mmdit", path)
    assert str(path) in message
    assert "can run code" in message and ".safetensors" in message


def test_a_pickle_with_a_safetensors_name_is_refused_as_what_it_is(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    assert zipfile.is_zipfile(path)
    assert "can run code" in _refusal("mmdit", path)


def test_folder_with_pickles_only_is_refused_as_such(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    message = _refusal("vae", tmp_path)
    assert "diffusion_pytorch_model.bin" in message and "can run code" in message


def test_gguf_is_refused_by_content_and_by_name(tmp_path):
    for name in ("model.gguf", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
        assert "GGUF is not supported" in _refusal("mmdit", path)


FOREIGN = {
    "SDXL checkpoint": ["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "Stable Diffusion 1 or 2": ["cond_stage_model.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "UNet": ["input_blocks.0.0.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "Flux ": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "Flux  ": ["transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.proj_out.weight"],
    "ControlNet": ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.add_q_proj.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("component", ["mmdit", "vae", "t5xxl"])
def test_checkpoints_of_other_models_are_named(tmp_path, kind, component):
    message = _refusal(component, _named(tmp_path / "x.safetensors", *FOREIGN[kind]))
    assert kind.strip() in message and "not Stable Diffusion 3" in message


def test_clip_in_openclips_layout_is_named_with_the_way_out(tmp_path):
    file = _named(tmp_path / "x.safetensors", "transformer.resblocks.0.ln_1.weight", "visual.proj")
    assert "OpenCLIP's layout: pass the file with transformers' names" in _refusal("clip_g", None, file)


LORAS = {
    "kohya": ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "lora_unet_x.alpha"],
    "diffusers": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "peft": ["base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight"],
    "comfy": ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight"],
    "lycoris": ["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"],
    "loha": ["lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a"],
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_given_as_model_is_named(tmp_path, kind):
    message = _refusal("mmdit", _named(tmp_path / "x.safetensors", *LORAS[kind]))
    assert "is a LoRA adapter, not a model" in message and "--model" in message


@pytest.mark.parametrize(
    "component, option", [("t5xxl", "--t5xxl"), ("clip_l", "--clip-l"), ("clip_g", "--clip-g"), ("vae", "--vae")]
)
def test_missing_part_names_the_option_that_gives_it(parts, tmp_path, component, option):
    model = save_single_file(tmp_path / "sd3.5_medium.safetensors", {"mmdit": parts["mmdit"]})
    message = _refusal(component, model)
    assert message.endswith(f"(it holds MMDiT): pass {option} FILE")


def test_missing_mmdit_asks_for_a_checkpoint_that_has_it(parts, tmp_path):
    message = _refusal("mmdit", save_part(tmp_path / "vae.safetensors", parts["vae"]))
    assert "holds no MMDiT (it holds VAE)" in message and "--model" in message


def test_wrong_part_in_an_explicit_file_is_named(parts, tmp_path):
    file = save_part(tmp_path / "t5.safetensors", parts["t5xxl"])
    message = _refusal("vae", None, file)
    assert "holds no VAE (it holds T5-XXL): pass another file as --vae" in message
    clip = save_part(tmp_path / "clip.safetensors", parts["clip_l"])
    assert "it holds a CLIP text encoder" in _refusal("t5xxl", None, clip)


@pytest.mark.parametrize("asked, width, found", [("clip_l", 1280, "CLIP-G"), ("clip_g", 768, "CLIP-L")])
def test_exchanged_clips_of_the_published_sizes_are_told_apart(parts, tmp_path, asked, width, found):
    tensors = parts["clip_l"] | {"text_model.embeddings.token_embedding.weight": torch.zeros(4, width)}
    message = _refusal(asked, None, save_part(tmp_path / "clip.safetensors", tensors))
    assert f"is {found}" in message


def test_nothing_given_says_which_options_there_are():
    assert _refusal("t5xxl", None) == "nothing to take the T5-XXL from: pass --model, or --t5xxl FILE"


def test_file_of_unrelated_tensors_is_named_with_an_example(tmp_path):
    message = _refusal("mmdit", _named(tmp_path / "x.safetensors", "resnet.fc.weight", "zzz"))
    assert "no part of Stable Diffusion 3" in message and "resnet.fc.weight" in message


def test_empty_safetensors_file_is_named(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert "it has no tensors" in _refusal("vae", tmp_path / "x.safetensors")


def test_missing_path_is_named(tmp_path):
    assert "no such file" in _refusal("mmdit", tmp_path / "absent.safetensors")


def test_mistyped_file_name_is_answered_with_the_nearest(parts, tmp_path):
    save_part(tmp_path / "sd3.5_medium.safetensors", parts["mmdit"])
    message = _refusal("mmdit", tmp_path / "sd3.5-medium.safetensors")
    assert message.endswith(f"no such file (did you mean {tmp_path / 'sd3.5_medium.safetensors'}?)")


@pytest.mark.parametrize("name", ["a" * 300, "nul\0byte", "", " ", "/dev/null", "/proc/self/mem"])
def test_odd_paths_are_input_errors(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert _refusal("mmdit", name)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_one_file_of_several_is_answered_with_the_folder(parts, tmp_path, name):
    save_part(tmp_path / name, parts["t5xxl"])
    assert _refusal("t5xxl", None, tmp_path / name).endswith(f"is one file of several: pass their folder, {tmp_path}")


def test_web_address_is_answered_with_what_to_pass():
    message = _refusal("mmdit", "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium")
    assert "hub id (OWNER/NAME)" in message


def test_mistyped_local_path_never_reaches_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the network was used"))
    for text in ("models/absent", "models/absent.safetensors", "sd3/absent.safetensors", "a/b/c", "absent"):
        assert "no such file" in _refusal("mmdit", text)


def test_folder_that_is_no_diffusers_folder_names_what_lies_in_it(parts, tmp_path):
    assert "not a diffusers folder" in _refusal("mmdit", tmp_path)
    save_part(tmp_path / "sd3.5_large.safetensors", parts["mmdit"])
    message = _refusal("mmdit", tmp_path)
    assert "sd3.5_large.safetensors" in message and "pass one of them" in message


def test_diffusers_folder_without_t5_asks_for_one(parts, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    save_part(tmp_path / "text_encoder" / "model.safetensors", parts["clip_l"])
    assert "holds no T5-XXL (no text_encoder_3/): pass --t5xxl FILE" in _refusal("t5xxl", tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "", 7, None])
def test_index_that_points_out_of_its_folder_is_refused(tmp_path, shard):
    (tmp_path / "text_encoder_3").mkdir()
    index = tmp_path / "text_encoder_3" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": shard}}))
    assert "outside its folder" in _refusal("t5xxl", tmp_path)


def test_index_with_a_name_that_no_file_can_have_is_refused(tmp_path):
    (tmp_path / "text_encoder_3").mkdir()
    index = tmp_path / "text_encoder_3" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "n" * 300}}))
    assert "too long" in _refusal("t5xxl", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}', "[" * 100_000])
def test_damaged_index_is_named(tmp_path, text):
    (tmp_path / "text_encoder_3").mkdir()
    (tmp_path / "text_encoder_3" / "model.safetensors.index.json").write_text(text)
    assert "no weight_map" in _refusal("t5xxl", tmp_path)


def test_missing_shard_and_missing_tensor_are_named(parts, tmp_path):
    folder = tmp_path / "text_encoder_3"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": "a.safetensors"}}))
    assert "a.safetensors, which is missing" in _refusal("t5xxl", tmp_path)
    save_part(folder / "a.safetensors", {"other": torch.zeros(1)})
    assert "says that a.safetensors holds shared.weight, but it does not" in _refusal("t5xxl", tmp_path)


def test_file_cut_short_is_refused_before_anything_is_read(parts, tmp_path):
    path = save_single_file(tmp_path / "model.safetensors", {"mmdit": parts["mmdit"], "vae": parts["vae"]})
    content = path.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 2000, 9):
        path.write_bytes(content[:kept])
        assert "cut short" in _refusal("vae", path)


def test_quantised_weights_of_other_programs_are_refused(parts, tmp_path):
    key = "joint_blocks.0.x_block.attn.qkv.weight"
    packed = parts["mmdit"] | {key: torch.zeros(9, dtype=torch.uint8), f"{key}.absmax": torch.zeros(3)}
    assert "quantised for another program" in _refusal("mmdit", save_part(tmp_path / "nf4.safetensors", packed))
    int8 = parts["mmdit"] | {key: torch.zeros(parts["mmdit"][key].shape, dtype=torch.int8)}
    assert "stored as I8" in _refusal("mmdit", save_part(tmp_path / "int8.safetensors", int8))


def test_vae_of_sdxl_is_refused_with_the_way_out(parts, tmp_path):
    old = parts["vae"] | {
        "quant_conv.weight": torch.zeros(8, 8, 1, 1),
        "decoder.conv_in.weight": torch.zeros(96, 4, 3, 3),
    }
    path = save_part(tmp_path / "sdxl_vae.safetensors", old, PREFIXES["vae"])
    with pytest.raises(InputError, match=r"4 latent channels and a quant_conv.*--vae"):
        load_vae(path)


@pytest.mark.parametrize("load, component", [(load_mmdit, "mmdit"), (load_vae, "vae")])
def test_missing_and_unknown_tensors_are_named_with_the_file(parts, tmp_path, load, component):
    tensors = dict(parts[component])
    gone = list(tensors)[-1]
    del tensors[gone]
    with pytest.raises(InputError, match=rf"incomplete.safetensors.*lacks {gone}"):
        load(save_part(tmp_path / "incomplete.safetensors", tensors))
    tensors = parts[component] | {"extra.weight": torch.zeros(3)}
    with pytest.raises(InputError, match=r"more.safetensors.*not understood: extra.weight"):
        load(save_part(tmp_path / "more.safetensors", tensors))
