"""Adapter files: what is written and compared, and which files of others are read or refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.public_models import PUBLIC_ARCHITECTURES
from support.random_adapters import random_adapter, random_delta
from support.tiny_mmdit import tiny_architecture

from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.forms import parse, tensors_of
from sd3pipe.adapters.keymap import (
    WRITTEN_FORMS,
)  # fmt: skip
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.tensors.writer import write_tensors


@pytest.mark.parametrize("form", WRITTEN_FORMS)
def test_saved_file_is_compared_and_reported(tmp_path, form):
    adapter = random_adapter(tiny_architecture("sd35-medium"))
    saved = save_adapter(tmp_path / "a.safetensors", adapter, form=form, metadata={"ss_seed": "1"})
    assert saved.largest_difference <= 1e-6 and saved.modules == len(adapter)
    assert saved.nbytes == (tmp_path / "a.safetensors").stat().st_size
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.forms == (form,) and read.metadata["ss_seed"] == "1"
    assert compare(adapter, read.adapter)[0] == saved.largest_difference
    assert read.depth == 3


def test_half_precision_is_chosen_where_it_is_good_enough(tmp_path):
    adapter = random_adapter(tiny_architecture("sd35-large"), every=3)
    saved = save_adapter(tmp_path / "a.safetensors", adapter, dtype="auto")
    assert saved.dtypes == ("F16",) and 0 < saved.largest_difference < 1e-3


def test_half_precision_of_small_factors_is_saved_by_balancing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = "joint_blocks.0.x_block.attn.proj"
    delta = random_delta("lora", (192, 192), rank=2, alpha=1.0, generator=generator)
    small = {path: LoRADelta(down=delta.down, up=delta.up * 1e-6, alpha=1.0)}
    saved = save_adapter(tmp_path / "a.safetensors", small, dtype="auto")
    assert saved.dtypes == ("F16",) and saved.largest_difference < 1e-3


def test_half_precision_is_left_where_it_is_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = "joint_blocks.0.x_block.attn.proj"
    delta = random_delta("lora", (192, 192), rank=2, alpha=1.0, generator=generator)
    wide = torch.logspace(-7, 7, 192)
    uneven = {path: LoRADelta(down=delta.down * wide, up=delta.up * wide[:, None], alpha=1.0)}
    assert save_adapter(tmp_path / "a.safetensors", uneven, dtype="auto").dtypes == ("F32",)
    with pytest.raises(ParameterError, match="use --dtype fp32"):
        save_adapter(tmp_path / "b.safetensors", uneven, dtype="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_kept_dtype_is_kept(tmp_path):
    adapter = random_adapter(tiny_architecture("sd35-large"), every=5)
    save_adapter(tmp_path / "a.safetensors", adapter, dtype="bf16")
    halves = read_adapter(tmp_path / "a.safetensors").adapter
    saved = save_adapter(tmp_path / "b.safetensors", halves, form="comfyui-generic", dtype="same")
    assert saved.dtypes == ("BF16",) and saved.largest_difference == 0.0


def test_a_file_that_differs_from_its_source_never_gets_its_name(tmp_path, monkeypatch):
    from sd3pipe.adapters import files

    adapter = random_adapter(tiny_architecture("sd35-large"), every=5)
    monkeypatch.setattr(files, "tensors_of", lambda stored, form: {
        name: tensor * (1.01 if "lora_up" in name else 1.0) for name, tensor in tensors_of(stored, form).items()
    })  # fmt: skip
    with pytest.raises(ParameterError, match="would change by 1"):
        save_adapter(tmp_path / "a.safetensors", adapter)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_bytes_than_were_written_never_gets_its_name(tmp_path, monkeypatch):
    from sd3pipe.adapters import files

    def write_badly(handle, tensors, metadata):
        write_tensors(handle, {name: tensor.roll(1) for name, tensor in tensors.items()}, metadata)

    monkeypatch.setattr(files, "write_tensors", write_badly)
    for metadata in ({}, None):
        with pytest.raises(InputError, match="not those that"):
            save_adapter(tmp_path / "a.safetensors", random_adapter(tiny_architecture("sd35-large")), metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic", "diffusers"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_was_written_is_compared_without_a_second_copy_in_memory(form, dtype, tmp_path, monkeypatch):
    from sd3pipe.adapters import files

    def read_whole(stored):
        raise AssertionError("the file was read into memory")

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_stored", read_whole)
        path = tmp_path / "a.safetensors"
        saved = save_adapter(path, random_adapter(tiny_architecture("sd35-large"), every=5), form=form, dtype=dtype)
    assert files.compare(read_adapter(path).adapter, random_adapter(tiny_architecture("sd35-large"), every=5))[0] < 1e-3
    assert saved.nbytes == path.stat().st_size


def test_tensor_hash_is_that_of_sd_scripts(tmp_path):
    import hashlib

    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(tiny_architecture("sd35-large"), every=5), metadata={})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata()["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


def test_without_metadata_only_what_loading_needs_is_left(tmp_path):
    adapter = random_adapter(tiny_architecture("sd35-large"), every=5)
    save_adapter(tmp_path / "a.safetensors", adapter)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = random_adapter(tiny_architecture("sd35-large"))
    backwards = dict(reversed(adapter.items()))
    for name, chosen in (("a", adapter), ("b", backwards)):
        save_adapter(tmp_path / name, chosen, metadata={"x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- files that are something else ---

FOREIGN_FILES = {
    "a LoRA for SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (640, 4),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280),
    },
    "a LoRA for SD 1.5": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)
    },
    "a LoRA for Flux": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 3072)},
    "a LoRA for Flux ": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (3072, 4),
    },
    "a LoRA for Wan": {"diffusion_model.blocks.0.cross_attn.q.lora_A.weight": (4, 1536)},
    "a LoRA for another model": {"transformer.foo.bar.lora_A.weight": (4, 64)},
    "a textual-inversion embedding": {"clip_l": (3, 768), "clip_g": (3, 1280)},
    "a whole SD3 checkpoint": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    "a whole SD or SDXL checkpoint": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.x": (4, 4)},
    "a VAE": {"first_stage_model.decoder.up.0.block.0.conv1.weight": (4, 4)},
    "something else": {"foo": (1,)},
    "an empty file": {},
}


@pytest.mark.parametrize("what", FOREIGN_FILES)
def test_foreign_files_are_refused_with_what_they_seem_to_be(tmp_path, what):
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN_FILES[what].items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"seems to be {what.strip()}"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("form", WRITTEN_FORMS)
@pytest.mark.parametrize("variant", PUBLIC_ARCHITECTURES)
def test_adapters_of_the_public_models_seem_to_be_nothing_else(tmp_path, variant, form):
    """Of real sizes: the first blocks, those at the end of dual attention, and the last ones."""
    architecture, generator = PUBLIC_ARCHITECTURES[variant], torch.Generator().manual_seed(0)
    blocks = {0, 12, 13, architecture.depth - 2, architecture.depth - 1}
    sizes = {
        path: size
        for path, size in architecture.linear_sizes().items()
        if not path.startswith("joint_blocks.") or int(path.split(".")[1]) in blocks
    }
    for kind in ("lora", "dora", "loha", "lokr", "oft", "oftv2"):
        adapter = {
            path: random_delta(kind, size, rank=4, alpha=2.0, generator=generator) for path, size in sizes.items()
        }
        try:
            save_adapter(tmp_path / "a.safetensors", adapter, form=form, metadata={})
        except ParameterError as refusal:  # of a kind that the form has no names for
            assert kind != "lora", refusal
            continue
        found = read_adapter(tmp_path / "a.safetensors")
        assert found.adapter.keys() == adapter.keys() and variant in found.variants, kind


@pytest.fixture
def adapter_path(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(tiny_architecture("sd35-large"), every=4))
    return path


def test_unknown_keys_are_listed_or_left_out_with_a_warning(adapter_path, caplog):
    tensors = load_file(adapter_path) | {
        "lora_unet_strange_layer.lora_up.weight": torch.zeros(2, 2),
        "odd": torch.ones(1),
    }
    save_file(tensors, adapter_path)
    with pytest.raises(InputError, match=r"2 keys stand for nothing.*odd.*strange_layer"):
        read_adapter(adapter_path)
    assert len(read_adapter(adapter_path, ignore_unknown=True).unknown) == 2
    assert "strange_layer" in caplog.text


def test_most_of_a_file_is_never_left_out(tmp_path):
    """One module of 49 is another adapter, whatever --ignore-unknown says; half of them is what the user asked for."""
    path, known = tmp_path / "a.safetensors", pair("lora_unet_joint_blocks_0_x_block_attn_proj", 192, 192)
    for number in range(48):
        save_file(known | {key: t for n in range(number + 1) for key, t in pair(f"strange.{n}", 8, 8).items()}, path)
        if number == 0:
            assert read_adapter(path, ignore_unknown=True).adapter
    for ignore in (True, False):
        with pytest.raises(InputError, match=r"48 of 49 modules stand for nothing .*strange\.0.* and 90 more"):
            read_adapter(path, ignore_unknown=ignore)


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("apart", [False, True])
def test_names_of_the_checkpoint_are_read_with_or_without_thirds(prefix, apart):
    """OneTrainer writes them: q, k and v as qkv.0, qkv.1 and qkv.2, all halves as in the checkpoint."""
    adapter = random_adapter(tiny_architecture("sd35-medium"), every=3)
    tensors = {}
    for key, tensor in tensors_of(adapter, "comfyui-generic").items():
        name = prefix + key.removeprefix("diffusion_model.")
        if apart and ".qkv." in name:
            thirds = tensor.chunk(3) if "lora_B" in name else (tensor,) * 3
            tensors |= {name.replace(".qkv.", f".qkv.{part}."): third for part, third in enumerate(thirds)}
        else:
            tensors[name] = tensor
    parsed = parse(tensors)
    assert parsed.unknown == [] and "native" in parsed.forms and any("qkv" in path for path in adapter)
    assert compare(adapter, parsed.adapter)[0] < 1e-6


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_files_cut_short_are_refused(adapter_path, length):
    adapter_path.write_bytes(adapter_path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cut short or damaged|not a safetensors file|the file is empty"):
        read_adapter(adapter_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    save_adapter(path, random_adapter(tiny_architecture("sd35-large"), every=12), metadata={"ss_seed": "1"})
    return path


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_header_is_read_or_refused_but_nothing_else(small_file, data):
    content = bytearray(small_file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        byte = st.sampled_from(list(b'"{}[]:,0179FIUB._alorw\\\x00\xff'))
        content[data.draw(st.integers(0, end - 1))] = data.draw(byte)
    path = small_file.with_name("mutated.safetensors")
    path.write_bytes(content)
    try:
        assert read_adapter(path).adapter
    except InputError as error:
        assert "\n" not in str(error)


def test_pickles_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="can run code"):
        read_adapter(tmp_path / "a.pt")
    with pytest.raises(InputError, match="no such file"):
        read_adapter(tmp_path / "a.safetensors")


def test_a_whole_alpha_is_read_and_quantised_factors_are_refused(tmp_path):
    path, name = tmp_path / "a.safetensors", "lora_unet_joint_blocks_0_x_block_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 192), f"{name}.lora_up.weight": torch.ones(192, 4)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2)}, path)
    assert [delta.scale for delta in read_adapter(path).adapter.values()] == [0.5]
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match="stored as I8"):
        read_adapter(path)


QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def pair(name, rows, columns, up="lora_up", down="lora_down"):
    return {f"{name}.{down}.weight": torch.zeros(2, columns), f"{name}.{up}.weight": torch.zeros(rows, 2)}


def zeros(**shapes):
    """Tensors of one layer by what they are to it."""
    return {f"{QKV}.{part.replace('__', '.')}": torch.zeros(shape) for part, shape in shapes.items()}


SHAPES_WITHOUT_A_LAYER = {
    r"down has the shape \[0, 192\]": zeros(lora_down__weight=(0, 192), lora_up__weight=(576, 0)),
    r"down has the shape \[192\]": zeros(lora_down__weight=(192,), lora_up__weight=(576, 1)),
    r"down has the shape \[\]": zeros(lora_down__weight=(), lora_up__weight=(576, 1)),
    r"alpha has the shape \[2\]": pair(QKV, 576, 192) | zeros(alpha=(2,)),
    r"alpha has the shape \[0\]": pair(QKV, 576, 192) | zeros(alpha=(0,)),
    r"w1_a has the shape \[576, 0\]": zeros(
        hada_w1_a=(576, 0), hada_w1_b=(0, 192), hada_w2_a=(576, 0), hada_w2_b=(0, 192)
    ),
    r"lokr_w1 has the shape \[0, 4\]": zeros(lokr_w1=(0, 4), lokr_w2=(4, 4)),
    "a convolution in Tucker's": zeros(lokr_w1=(4, 4), lokr_w2_a=(2, 4), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 2, 2)),
    "the widest that are read": zeros(lokr_w1=(3 * 4096, 4096), lokr_w2=(4096, 4096)),
    "no SD3 adapter: it seems to be an empty file": {},
}


@pytest.mark.long
@pytest.mark.parametrize("message", SHAPES_WITHOUT_A_LAYER)
def test_shapes_without_a_layer_are_refused(tmp_path, message):
    save_file(SHAPES_WITHOUT_A_LAYER[message], tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a.safetensors")


CONTRADICTIONS = {
    "up missing beside": {f"{QKV}.lora_up.weight": None},
    "do not match": {f"{QKV}.lora_up.weight": torch.zeros(576, 9)},
    "not finite": {f"{QKV}.lora_up.weight": torch.full((576, 2), torch.nan)},
    r"magnitudes \[1, 191\] do not match": {f"{QKV}.dora_scale": torch.ones(1, 191)},
    "two sets of keys": pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", 576, 192, "lora_B", "lora_A"),
    "no SD3 model of width 192": pair("lora_unet_joint_blocks_7_x_block_attn_proj", 192, 192),
    "different width": pair("lora_unet_joint_blocks_1_x_block_attn_proj", 128, 128),
    "as a whole and in parts": pair("transformer.transformer_blocks.0.attn.to_q", 192, 192, "lora_B", "lora_A"),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_in_a_file_are_named(tmp_path, message):
    adapter = random_adapter(tiny_architecture("sd35-large"), embedders=False)
    tensors = tensors_of(adapter, "comfyui") | CONTRADICTIONS[message]
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("tiny", "paths", "fits"),
    [
        (False, ["joint_blocks.0.x_block.attn.proj"], ("sd3-medium", "sd35-medium")),
        (False, ["joint_blocks.0.x_block.attn2.proj"], ("sd35-medium",)),
        (True, ["joint_blocks.0.x_block.attn.proj"], ()),
    ],
)
def test_fitting_variants_follow_from_shapes(tmp_path, tiny, paths, fits):
    width = 192 if tiny else 1536
    generator = torch.Generator().manual_seed(0)
    adapter = {path: random_delta("lora", (width, width), rank=2, alpha=1.0, generator=generator) for path in paths}
    save_adapter(tmp_path / "a.safetensors", adapter)
    assert read_adapter(tmp_path / "a.safetensors").variants == fits
