"""Whatever files a component lies in, it gives the same tensors under the same keys, and one fingerprint."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from support.tiny_parts import PREFIXES, save_part, save_single_file, tiny_parts

from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.sources import find_component
from sd3pipe.tensors.reader import read_tensors

COMPONENTS = ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"]
SUBFOLDERS = {
    "mmdit": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
}


@pytest.fixture(scope="module")
def single_file(parts, tmp_path_factory):
    return save_single_file(tmp_path_factory.mktemp("single") / "sd3.5.safetensors", parts)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A diffusers folder, by diffusers' own converters; the T5 in three shards."""
    folder = tmp_path_factory.mktemp("diffusers")
    theirs = {
        "mmdit": convert_sd3_transformer_checkpoint_to_diffusers(dict(parts["mmdit"])),
        "vae": convert_ldm_vae_checkpoint(parts["vae"], {"down_block_types": [0] * 4, "up_block_types": [0] * 4}),
        "clip_l": parts["clip_l"],
        "clip_g": parts["clip_g"],
    }
    for component, tensors in theirs.items():
        stem = "diffusion_pytorch_model" if component in ("mmdit", "vae") else "model"
        (folder / SUBFOLDERS[component]).mkdir()
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / SUBFOLDERS[component] / f"{stem}.safetensors")
    save_shards(folder / "text_encoder_3", parts["t5xxl"], count=3)
    return folder


def save_shards(folder, tensors, *, count, stem="model"):
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        shard = {key: tensors[key] for key in list(tensors)[number::count]}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _assert_holds(source, expected):
    found = read_tensors(source.tensors, dtype=None)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("component", COMPONENTS)
def test_single_file_gives_the_tensors(parts, single_file, component):
    source = find_component(component, model=str(single_file))
    _assert_holds(source, parts[component])
    assert source.shapes() == {key: tuple(tensor.shape) for key, tensor in parts[component].items()}
    assert source.nbytes == sum(tensor.nbytes for tensor in parts[component].values())
    assert source.paths == (single_file,)


@pytest.mark.parametrize("component", COMPONENTS)
def test_diffusers_folder_gives_the_same_bits(parts, folder, component):
    _assert_holds(find_component(component, model=folder), parts[component])


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_folder_alone_gives_the_same_bits(parts, folder, component):
    _assert_holds(find_component(component, model=None, file=folder / SUBFOLDERS[component]), parts[component])


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefixed"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_separate_file_gives_the_tensors(parts, tmp_path, component, prefixed):
    prefix = PREFIXES[component] if prefixed else ""
    file = save_part(tmp_path / "part.safetensors", parts[component], prefix)
    _assert_holds(find_component(component, model=None, file=file), parts[component])


def test_bare_mmdit_and_bare_vae_serve_as_model(parts, tmp_path):
    for component in ("mmdit", "vae"):
        file = save_part(tmp_path / f"{component}.safetensors", parts[component])
        _assert_holds(find_component(component, model=file), parts[component])


def test_sharded_mmdit_with_thirds_in_different_files_gives_the_same_bits(parts, tmp_path):
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(parts["mmdit"]))
    contiguous = {key: tensor.contiguous() for key, tensor in sorted(theirs.items())}
    save_shards(tmp_path / "transformer", contiguous, count=4, stem="diffusion_pytorch_model")
    source = find_component("mmdit", model=tmp_path)
    qkv = source.tensors["joint_blocks.0.x_block.attn.qkv.weight"]
    assert len(qkv.paths) > 1, "the test wants q, k and v apart"
    _assert_holds(source, parts["mmdit"])


def test_fp16_variant_is_read_where_there_is_no_full_precision(parts, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    save_part(tmp_path / "text_encoder" / "model.fp16.safetensors", parts["clip_l"])
    _assert_holds(find_component("clip_l", model=tmp_path), parts["clip_l"])


def test_explicit_file_beats_the_copy_inside_the_checkpoint(single_file, tmp_path):
    other = tiny_parts(seed=7)["vae"]
    file = save_part(tmp_path / "vae.safetensors", other)
    _assert_holds(find_component("vae", model=single_file, file=file), other)


def test_stray_tensors_of_text_encoders_are_left_out(parts, tmp_path):
    strays = {"text_model.embeddings.position_ids": torch.arange(77), "logit_scale": torch.tensor(4.6)}
    clip = save_part(tmp_path / "clip.safetensors", parts["clip_l"] | strays)
    _assert_holds(find_component("clip_l", model=None, file=clip), parts["clip_l"])
    duplicate = {"encoder.embed_tokens.weight": parts["t5xxl"]["shared.weight"].clone()}
    t5 = save_part(tmp_path / "t5.safetensors", parts["t5xxl"] | duplicate)
    _assert_holds(find_component("t5xxl", model=None, file=t5), parts["t5xxl"])


def test_t5_with_the_embedding_under_its_other_name_alone_is_understood(parts, tmp_path):
    renamed = dict(parts["t5xxl"])
    renamed["encoder.embed_tokens.weight"] = renamed.pop("shared.weight")
    file = save_part(tmp_path / "t5.safetensors", renamed)
    _assert_holds(find_component("t5xxl", model=None, file=file), parts["t5xxl"])


@pytest.mark.parametrize("component", ["clip_l", "clip_g"])
def test_whole_clip_is_its_text_half_and_clip_l_without_projection(parts, tmp_path, component):
    text = parts[component]
    width = text["text_model.final_layer_norm.weight"].shape[0]
    vision = {
        "vision_model.encoder.layers.0.layer_norm1.weight": torch.zeros(4),
        "vision_model.embeddings.position_ids": torch.arange(4)[None],
        "visual_projection.weight": torch.zeros(width, 4),
        "text_projection.weight": text.get("text_projection.weight", torch.randn(width, width)),
        "logit_scale": torch.zeros(()),
    }
    file = save_part(tmp_path / "clip.safetensors", text | vision)
    _assert_holds(find_component(component, model=None, file=file), text)


def test_clip_saved_by_transformers_5_without_its_outer_name_is_understood(parts, tmp_path):
    bare = {key.removeprefix("text_model."): tensor for key, tensor in parts["clip_g"].items()}
    file = save_part(tmp_path / "clip_g.safetensors", bare)
    _assert_holds(find_component("clip_g", model=None, file=file), parts["clip_g"])


def test_any_subset_of_the_parts_may_be_in_one_file(parts, tmp_path):
    some = {name: parts[name] for name in ("mmdit", "clip_g")}
    file = save_single_file(tmp_path / "some.safetensors", some)
    for component, expected in some.items():
        _assert_holds(find_component(component, model=file), expected)


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_fingerprint_whatever_the_layout(parts, single_file, folder, tmp_path, component):
    bare = save_part(tmp_path / "bare.safetensors", dict(reversed(parts[component].items())))
    prefixed = save_part(tmp_path / "prefixed.safetensors", parts[component], PREFIXES[component])
    found = {
        find_component(component, model=single_file).fingerprint(),
        find_component(component, model=folder).fingerprint(),
        find_component(component, model=None, file=bare).fingerprint(),
        find_component(component, model=None, file=prefixed).fingerprint(),
    }
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_one_changed_bit_changes_the_fingerprint(parts, tmp_path):
    file = save_part(tmp_path / "vae.safetensors", parts["vae"])
    source = find_component("vae", model=file)
    before = source.fingerprint()
    entry = source.tensors["decoder.conv_out.bias"]
    with open(file, "r+b") as handle:
        handle.seek(entry.ranges[0].offset + entry.nbytes - 1)
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ 1]))
    assert find_component("vae", model=file).fingerprint() != before


def test_name_dtype_and_shape_enter_the_fingerprint(parts, tmp_path):
    key = "decoder.conv_out.bias"
    vae = parts["vae"]
    as_bits = vae[key].view(torch.float16)  # the same bytes as another number format
    other_name = {f"{name}s" if name == key else name: tensor for name, tensor in vae.items()}
    variants = {"same": vae, "dtype": vae | {key: as_bits}, "shape": vae | {key: vae[key][None]}, "name": other_name}
    fingerprints = {
        name: find_component("vae", model=save_part(tmp_path / f"{name}.safetensors", tensors)).fingerprint()
        for name, tensors in variants.items()
    }
    assert len(set(fingerprints.values())) == len(variants)


def test_remembered_fingerprint_is_recalled_without_reading(folder, tmp_path, monkeypatch):
    stamps = FileStamps(tmp_path / "memory.json")
    first = find_component("t5xxl", model=folder).fingerprint(stamps)
    monkeypatch.setattr("sd3pipe.tensors.hash._hash", lambda *_: pytest.fail("the files were read again"))
    assert find_component("t5xxl", model=folder).fingerprint(stamps) == first


def test_fingerprint_is_made_again_when_one_of_several_files_changes(parts, tmp_path):
    save_shards(tmp_path / "text_encoder_3", parts["t5xxl"], count=2)
    stamps = FileStamps(tmp_path / "memory.json")
    before = find_component("t5xxl", model=tmp_path).fingerprint(stamps)
    other = dict(parts["t5xxl"])
    other[list(other)[1]] = other[list(other)[1]] + 1  # lies in the second shard
    save_shards(tmp_path / "text_encoder_3", other, count=2)
    after = find_component("t5xxl", model=tmp_path).fingerprint(stamps)
    assert after != before
    assert after == find_component("t5xxl", model=tmp_path).fingerprint()


def test_a_distrusted_memory_reads_again(parts, tmp_path, monkeypatch):
    file = save_part(tmp_path / "vae.safetensors", parts["vae"])
    find_component("vae", model=file).fingerprint(stamps := FileStamps(tmp_path / "memory.json"))
    stamps.save()
    monkeypatch.setattr("sd3pipe.tensors.hash._hash", lambda *_: "read again")
    assert find_component("vae", model=file).fingerprint(FileStamps(tmp_path / "memory.json", trust=False)) == (
        "read again"
    )


def test_a_long_read_is_told_and_a_short_one_is_not(parts, tmp_path, monkeypatch, caplog):
    file = save_part(tmp_path / "vae.safetensors", parts["vae"])
    with caplog.at_level("INFO"):
        find_component("vae", model=file).fingerprint()
        assert caplog.messages == []
        monkeypatch.setattr("sd3pipe.tensors.hash._TOLD_BYTES", 1000)
        find_component("vae", model=file).fingerprint()
    assert len(caplog.messages) == 1 and str(file) in caplog.messages[0]


def test_golden_fingerprint(tmp_path):
    """Changes only if the rule of fingerprints changes, which makes every cache stale: then raise its format number."""
    tensors = {
        "encoder.down.0.block.0.conv1.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "decoder.conv_in.bias": torch.tensor([1.5], dtype=torch.float16),
    }
    file = save_part(tmp_path / "vae.safetensors", tensors)
    assert find_component("vae", model=file).fingerprint() == GOLDEN


GOLDEN = "409b9f1ebbcee5a9200800b65afff20d7c9eb8c4936a290311daeeee9d742824"


def test_finding_and_fingerprinting_need_no_torch(single_file):
    code = (
        "import sys\n"
        "from sd3pipe.models.sources import find_component\n"
        f"find_component('t5xxl', model={str(single_file)!r}).fingerprint()\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
