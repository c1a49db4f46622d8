"""A whole model with an adapter in it: the base's own layout, predicting as base and adapter do."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import forked, report_of
from support.comparing import relative_error
from support.random_adapters import random_adapter
from support.tiny_base import write_tiny_base
from support.tiny_mmdit import random_inputs, tiny_architecture
from support.tiny_parts import PREFIXES
from support.written_files import single_file

from sd3pipe.adapters.files import save_adapter
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.commands.export import main
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.params.export import ExportParams

VARIANTS = ["sd3-medium", "sd35-medium", "sd35-large"]
KINDS = ["lora", "dora", "loha", "lokr", "oft", "oftv2", "exact oftv2"]


def export(tmp_path, model, adapter, out, **options):
    save_adapter(tmp_path / "lora.safetensors", adapter)
    main(ExportParams(adapter=tmp_path / "lora.safetensors", format="checkpoint", model=str(model), out=out, threads=1,
                      device="cpu", **options))  # fmt: skip
    return report_of(out)


def layout(path):
    """The header of a file without its metadata, names in order."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return list(header.items())


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "dora over lokr", "dora of columns", "full"])
def test_merged_file_predicts_as_base_and_adapter_do(tmp_path, variant, kind):
    base = single_file(tmp_path / "base.safetensors", variant)
    adapter, inputs = random_adapter(tiny_architecture(variant), kind, every=2), random_inputs()
    report = export(tmp_path, base, adapter, tmp_path / "merged.safetensors")
    model = load_mmdit(base)
    before = model(**inputs)
    attach_deltas(model, adapter)
    merged = load_mmdit(tmp_path / "merged.safetensors")(**inputs)
    assert relative_error(merged, model(**inputs)) < 1e-5
    assert relative_error(before, merged) > 0.02
    assert report["modules"] == len(adapter) * (2 if kind == "full" else 1)  # weights, and biases
    assert report["largest_difference"] < 1e-6
    assert report["exit_code"] == 0


def test_merged_file_keeps_layout_formats_and_everything_else(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-medium", torch.float16)
    adapter = random_adapter(tiny_architecture("sd35-medium"), every=5)
    export(tmp_path, base, adapter, tmp_path / "merged.safetensors")
    assert layout(tmp_path / "merged.safetensors") == layout(base)
    old, new = load_file(base), load_file(tmp_path / "merged.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{PREFIXES['mmdit']}{path}.weight" for path in adapter}
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        found = file.metadata()
    assert (found["modelspec.title"], found["modelspec.merged_from"]) == ("merged", "base, lora")
    assert found["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    assert found["modelspec.author"] == "Ada" and "modelspec.hash_sha256" not in found


def test_merged_file_carries_the_words_and_never_replaces_its_base(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-large")
    adapter = random_adapter(tiny_architecture("sd35-large"), every=9)
    export(tmp_path, base, adapter, tmp_path / "merged.safetensors", metadata_title="with cat", multiplier=0.5)
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "with cat"
        assert file.metadata()["sd3pipe_merged_multiplier"] == "0.5"
    before = base.read_bytes()
    with pytest.raises(ParameterError, match="choose another name"):
        export(tmp_path, base, adapter, base)
    assert base.read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_bare_files_are_merged_too(tmp_path, prefix):
    base = single_file(tmp_path / "base.safetensors", "sd35-large", prefix=prefix)
    tensors = {name: tensor for name, tensor in load_file(base).items() if "first_stage" not in name}
    save_file(tensors, base)
    adapter = random_adapter(tiny_architecture("sd35-large"), every=3)
    assert export(tmp_path, base, adapter, tmp_path / "merged.safetensors")["modules"] == len(adapter)


def test_multiplier_scales_the_change(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-large")
    adapter, inputs = random_adapter(tiny_architecture("sd35-large"), every=2), random_inputs()
    export(tmp_path, base, adapter, tmp_path / "half.safetensors", multiplier=0.5)
    model = load_mmdit(base)
    attach_deltas(model, adapter).set_multiplier(0.5)
    assert relative_error(load_mmdit(tmp_path / "half.safetensors")(**inputs), model(**inputs)) < 1e-5


def test_rounding_of_a_16_bit_base_is_reported(tmp_path, caplog):
    base = single_file(tmp_path / "base.safetensors", "sd35-large", torch.bfloat16)
    adapter = random_adapter(tiny_architecture("sd35-large"), every=4)
    strong = export(tmp_path, base, adapter, tmp_path / "strong.safetensors")["largest_difference"]
    weak = export(tmp_path, base, adapter, tmp_path / "weak.safetensors", multiplier=0.01)["largest_difference"]
    assert 1e-4 < strong < 0.1 < weak
    assert "a base in fp32 would keep it" in caplog.text


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A diffusers folder with an fp32 transformer of two shards, and its architecture."""
    base = write_tiny_base(tmp_path_factory.mktemp("tiny"), layout="diffusers", depth=3)
    transformer = base.model / "transformer"
    file = transformer / "diffusion_pytorch_model.safetensors"
    names = sorted(load_file(file))
    shards = {name: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    weights = load_file(file)
    for shard in set(shards.values()):
        save_file({name: weights[name].float() for name in names if shards[name] == shard}, transformer / shard)
    file.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": shards}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return base


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "dora over loha", "full"])
def test_merged_folder_loads_in_diffusers_and_here(tmp_path, tiny_folder, kind):
    architecture = tiny_folder.architecture.mmdit
    adapter = random_adapter(architecture, kind)
    report = export(tmp_path, tiny_folder.model, adapter, tmp_path / "merged")
    assert report["largest_difference"] < 1e-6
    inputs = random_inputs()
    inputs["context_BLD"] = torch.randn(2, 10, architecture.context_width)
    inputs["pooled_BP"] = torch.randn(2, architecture.pooled_width)
    model = load_mmdit(tiny_folder.model)
    attach_deltas(model, adapter)
    expected = model(**inputs)
    assert relative_error(load_mmdit(tmp_path / "merged")(**inputs), expected) < 1e-5
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "merged" / "transformer")
    with torch.no_grad():
        (prediction,) = theirs(
            hidden_states=inputs["latents_BChw"], timestep=inputs["timesteps_B"],
            encoder_hidden_states=inputs["context_BLD"], pooled_projections=inputs["pooled_BP"], return_dict=False,
        )  # fmt: skip
    assert relative_error(prediction, expected) < 1e-4


def test_merged_folder_is_a_whole_pipeline(tmp_path, tiny_folder):
    adapter = random_adapter(tiny_folder.architecture.mmdit, every=4)
    export(tmp_path, tiny_folder.model, adapter, tmp_path / "merged")
    ours = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    theirs = {path.relative_to(tiny_folder.model) for path in tiny_folder.model.rglob("*") if path.is_file()}
    assert ours == theirs
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged").transformer.config.num_layers == 3


@pytest.mark.parametrize("has_index", [True, False])
def test_what_else_a_download_holds_is_not_taken_for_the_merged_model(tmp_path, tiny_folder, caplog, has_index):
    model = shutil.copytree(tiny_folder.model, tmp_path / "model")
    others = ["sd3.5_medium.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"]
    others += ["text_encoders/clip_l.safetensors"] if has_index else []
    hidden = [".git/objects/a", ".cache/huggingface/download/b.lock"]
    for name in (*others, *hidden):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"0")
    (model / "LICENSE.md").write_text("words")
    if not has_index:
        (model / "model_index.json").unlink()
    export(tmp_path, model, random_adapter(tiny_folder.architecture.mmdit, every=4), tmp_path / "merged")
    ours, theirs = (
        {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        for place in (tmp_path / "merged", model)
    )
    assert ours == theirs - {*others, *hidden} and "LICENSE.md" in ours
    assert f"left out, as the adapter is not merged into them: {', '.join(sorted(others))}" in caplog.text


def refusal(tmp_path, error, model, adapter, out="merged.safetensors", **options):
    with pytest.raises(error) as caught:
        export(tmp_path, model, adapter, tmp_path / out, **options)
    left = {path.name for path in tmp_path.iterdir()} - {"base.safetensors", "lora.safetensors", "scaled.safetensors"}
    assert left <= {f"{out}.report.json"}
    assert report_of(tmp_path / out)["exit_code"] == error.exit_code
    return str(caught.value)


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd3-medium")
    fits = random_adapter(tiny_architecture("sd3-medium"), every=4)
    dual = random_adapter(tiny_architecture("sd35-medium"))
    assert "does not fit" in refusal(tmp_path, InputError, base, dual)
    smaller = random_adapter(tiny_architecture("sd3-medium", depth=2), every=4)
    assert "does not fit" in refusal(tmp_path, InputError, base, smaller)
    assert "leave --dtype out" in refusal(tmp_path, ParameterError, base, fits, dtype="fp16")


def test_columns_of_a_dora_on_fused_layers_are_refused_where_the_model_has_thirds(tmp_path, tiny_folder):
    adapter = random_adapter(tiny_folder.architecture.mmdit, "dora of columns", every=2)
    assert "q, k and v together" in refusal(tmp_path, InputError, tiny_folder.model, adapter, out="merged")


def test_an_existing_folder_is_never_replaced(tmp_path, tiny_folder):
    (tmp_path / "merged").mkdir()
    adapter = random_adapter(tiny_folder.architecture.mmdit, every=4)
    with pytest.raises(ParameterError, match="exists already"):
        export(tmp_path, tiny_folder.model, adapter, tmp_path / "merged")


def test_scaled_fp8_bases_are_refused(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd3-medium")
    tensors = load_file(base)
    name = PREFIXES["mmdit"] + "joint_blocks.0.x_block.attn.qkv"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.scale_weight"] = torch.tensor(1.0)
    tensors[PREFIXES["mmdit"] + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, base)
    adapter = random_adapter(tiny_architecture("sd3-medium"), every=1)
    assert "quantised" in refusal(tmp_path, InputError, base, adapter)


@pytest.mark.long
def test_the_command_line_merges(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-large")
    save_adapter(tmp_path / "lora.safetensors", random_adapter(tiny_architecture("sd35-large"), every=4))
    done = forked("export", "--adapter", "lora.safetensors", "--format", "checkpoint", "--model", base, "--out",
                   "merged.safetensors", cwd=tmp_path)  # fmt: skip
    assert "every bit as written" in done.stdout
    words = ["export", "--adapter", "lora.safetensors", "--format", "checkpoint", "--out", "x.safetensors"]
    forked(*words, cwd=tmp_path, expect=2)


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """3 GB of other components, tensors of 0.6 GB: the process stays below 2 GB and the largest tensor."""
    base = single_file(tmp_path / "base.safetensors", "sd35-large")
    data = base.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    for number in range(5):
        start = len(content) + number * 600_000_000
        header[f"text_encoders.t5xxl.transformer.{number}"] = {
            "dtype": "F16", "shape": [300_000_000], "data_offsets": [start, start + 600_000_000]
        }  # fmt: skip
    text = json.dumps(header).encode()
    with open(base, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + content)
        file.truncate(8 + len(text) + len(content) + 3_000_000_000)  # sparse
    save_adapter(tmp_path / "lora.safetensors", random_adapter(tiny_architecture("sd35-large")))
    # The process says its own peak: what the kernel counts for children is the most of all that ran before.
    measured = (
        "import atexit, runpy; from sd3pipe.device_memory import peak_rss_bytes;"
        "atexit.register(lambda: print('peak', peak_rss_bytes())); runpy.run_module('sd3pipe', run_name='__main__')"
    )
    arguments = ["export", "--format", "checkpoint", "--model", base, "--adapter", "lora.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", measured, *arguments, "--out", "merged.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout.split("peak ")[-1])
    assert peak < 1_000_000_000  # torch and the tiny tensors; nothing of the large ones
