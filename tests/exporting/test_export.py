"""`sd3pipe export` to adapter files: where the adapter is found, what is written, what the file says of itself."""

import base64
import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support.command_line import report_of
from support.random_adapters import random_adapter
from support.tiny_mmdit import tiny_architecture
from support.written_files import metadata_of, single_file, trained_metadata

from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.kind import plain_adapter
from sd3pipe.adapters.metadata import modelspec
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.commands.export import main
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.params.export import ExportParams

ARCHITECTURE = tiny_architecture("sd35-medium")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def run(tmp_path):
    """A run folder with three checkpoints; the finished adapter is that of the last."""
    for step in (10, 20, 100):
        path = tmp_path / "cat" / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors"
        save_adapter(path, random_adapter(ARCHITECTURE, seed=step), metadata=trained_metadata(step))
    save_adapter(tmp_path / "cat" / "final" / "adapter.safetensors", random_adapter(ARCHITECTURE, seed=100))
    return tmp_path / "cat"


def export(adapter, out, **options):
    main(ExportParams(adapter=adapter, out=out, threads=1, device="cpu", **options))
    return report_of(out)


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic", "diffusers"])
def test_run_means_its_finished_adapter(run, tmp_path, form):
    report = export(run, tmp_path / "out.safetensors", format=form, dtype="fp32")
    error, _ = compare(random_adapter(ARCHITECTURE, seed=100), read_adapter(tmp_path / "out.safetensors").adapter)
    assert error == report["largest_difference"] < 1e-6
    assert report["stage"] == "export" and report["form"] == form and report["dtypes"] == ["F32"]
    assert report["inputs"]["adapter"] == str(run)


def test_unfinished_run_means_its_newest_checkpoint_with_a_warning(run, tmp_path, caplog):
    (run / "final" / "adapter.safetensors").unlink()
    export(run, tmp_path / "out.safetensors", dtype="same")
    assert compare(random_adapter(ARCHITECTURE, seed=100), read_adapter(tmp_path / "out.safetensors").adapter)[0] == 0
    assert "step-00000100" in caplog.text


def test_checkpoints_and_files_are_taken_as_they_are(run, tmp_path):
    checkpoint = run / "checkpoints" / "step-00000010"
    for number, adapter in enumerate((checkpoint, checkpoint / "adapter.safetensors")):
        export(adapter, tmp_path / f"{number}.safetensors", dtype="same")
        read = read_adapter(tmp_path / f"{number}.safetensors").adapter
        assert compare(random_adapter(ARCHITECTURE, seed=10), read)[0] == 0


def test_all_checkpoints_are_written_under_names_that_sort(run, tmp_path):
    report = export(run, tmp_path / "all", checkpoints="all")
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"cat-step{step:08d}.safetensors" for step in (10, 20, 100)] + ["cat.safetensors"]
    assert report["files"].keys() == set(names)


def test_half_precision_is_the_default(run, tmp_path):
    report = export(run, tmp_path / "out.safetensors")
    assert report["dtypes"] == ["F16"] and 0 < report["largest_difference"] < 1e-3


def test_metadata_is_kept_and_the_users_words_are_added(run, tmp_path):
    (tmp_path / "cat.png").write_bytes(PNG)
    adapter = run / "checkpoints" / "step-00000020"
    export(adapter, tmp_path / "out.safetensors", metadata_author="Ada", thumbnail=tmp_path / "cat.png")
    found = metadata_of(tmp_path / "out.safetensors")
    assert found["modelspec.author"] == "Ada"
    assert found["modelspec.thumbnail"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert found["modelspec.title"] == found["ss_output_name"] == "cat"
    assert found["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert (found["modelspec.sai_model_spec"], found["modelspec.prediction_type"]) == ("1.0.1", "flow")
    assert (found["modelspec.resolution"], found["ss_resolution"]) == ("1024x768", "(1024, 768)")
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora_sd3",
        "4",
        "2.0",
    )
    assert json.loads(found["ss_network_args"]) == {"x_mlp_dim": "8"}
    assert json.loads(found["ss_dataset_dirs"]) == {"cats": {"n_repeats": 10, "img_count": 3}}
    assert (found["ss_apply_t5_attn_mask"], found["ss_t5xxl_max_token_length"]) == ("False", "154")
    assert found["ss_base_model_version"] == "5-medium" and found["ss_steps"] == "20"
    assert json.loads(found["sd3pipe"])["fingerprints"] == {"mmdit": "ab" * 32}
    assert not any("date" in key for key in found)


def test_without_metadata_the_file_says_nothing(run, tmp_path):
    export(run / "checkpoints" / "step-00000020", tmp_path / "out.safetensors", metadata="none")
    assert metadata_of(tmp_path / "out.safetensors") == {"format": "pt"}


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ({"algorithm": "loha"}, {"algo": "loha"}),
        ({"algorithm": "lokr", "lokr_factor": 8}, {"algo": "lokr", "factor": "8"}),
        ({"algorithm": "dora"}, {"algo": "lora", "dora_wd": "True"}),
        ({"algorithm": "oft"}, {"algo": "diag-oft"}),
    ],
)
def test_kinds_that_sd_scripts_has_not_are_called_as_lycoris_calls_them(shape, arguments):
    found = trained_metadata(**shape)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"]) == {"x_mlp_dim": "8", **arguments}


def test_an_oft_says_the_constraint_that_it_has():
    assert trained_metadata(algorithm="oft", alpha=None)["ss_network_alpha"] == "0.0"
    assert trained_metadata(algorithm="oft", alpha=0.5)["ss_network_alpha"] == "0.5"
    assert trained_metadata(algorithm="lora", alpha=None, rank=8)["ss_network_alpha"] == "8"


def test_date_comes_from_the_environment_alone(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert modelspec("sd35-large", None)["modelspec.date"] == "2023-11-14T22:13:20Z"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert "modelspec.date" not in modelspec("sd35-large", None)


def comfyui_weight(weight, tensors, name):
    """ComfyUI's own sum for a DoRA with magnitudes per output row."""
    up, down = tensors[f"{name}.lora_up.weight"].float(), tensors[f"{name}.lora_down.weight"].float()
    changed = weight + up @ down * (tensors[f"{name}.alpha"].item() / down.shape[0])
    return changed * (tensors[f"{name}.dora_scale"].float() / weight.norm(dim=1, keepdim=True))


def test_a_tlora_is_exported_as_a_lora_and_says_what_that_loses(tmp_path, caplog):
    adapter = random_adapter(ARCHITECTURE, "tlora", every=3)
    save_adapter(tmp_path / "a.safetensors", adapter, metadata={"ss_seed": "7"})
    for form in ("comfyui", "diffusers"):
        caplog.clear()
        export(tmp_path / "a.safetensors", tmp_path / f"{form}.safetensors", format=form, dtype="fp32")
        assert caplog.text.count("whose ranks all act at every noise level") == 1
        assert not any("tlora" in key for key in metadata_of(tmp_path / f"{form}.safetensors"))
        found = read_adapter(tmp_path / f"{form}.safetensors").adapter
        assert {delta.algorithm for delta in found.values()} == {"lora"} and compare(found, plain_adapter(adapter))[
            0
        ] < 1e-6


def test_turned_inputs_are_written_out_for_comfyui_and_refused_for_a_hub(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-medium")
    adapter = random_adapter(ARCHITECTURE, "oftv2", every=3)
    save_adapter(tmp_path / "a.safetensors", adapter)
    with pytest.raises(ParameterError, match="what ComfyUI reads of it depends on the base model: pass --model"):
        export(tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    export(tmp_path / "a.safetensors", tmp_path / "out.safetensors", model=str(base), dtype="fp32")
    written, model = read_adapter(tmp_path / "out.safetensors").adapter, load_mmdit(base)
    for path, linear in model.linears():
        if path in adapter:
            expected = adapter[path].change(linear.dense_weight())
            torch.testing.assert_close(written[path].dense(), expected, rtol=1e-6, atol=1e-6)
    assert {delta.algorithm for delta in written.values()} == {"full"}
    export(tmp_path / "a.safetensors", tmp_path / "peft.safetensors", format="diffusers", dtype="fp32")
    assert compare(adapter, read_adapter(tmp_path / "peft.safetensors").adapter)[0] == 0.0
    with pytest.raises(ParameterError, match="they load no rotation of inputs"):
        export(tmp_path / "a.safetensors", tmp_path / "hub", format="hub")


def test_dora_for_comfyui_gives_its_sum_the_trained_weight(tmp_path):
    base = single_file(tmp_path / "base.safetensors", "sd35-medium")
    dora = random_adapter(ARCHITECTURE, "dora", every=3)
    save_adapter(tmp_path / "dora.safetensors", dora)
    with pytest.raises(ParameterError, match="pass --model"):
        export(tmp_path / "dora.safetensors", tmp_path / "out.safetensors")
    export(tmp_path / "dora.safetensors", tmp_path / "out.safetensors", model=str(base), dtype="fp32", metadata="none")
    tensors, model = load_file(tmp_path / "out.safetensors"), load_mmdit(base)
    weights = {path: linear.dense_weight().clone() for path, linear in model.linears()}
    attach_deltas(model, dora)
    linears = dict(model.linears())
    for path in dora:
        if path == "x_embedder.proj":
            continue
        by_comfyui = comfyui_weight(weights[path], tensors, "lora_unet_" + path.replace(".", "_"))
        x = torch.randn(1, 4, weights[path].shape[1])
        ours = linears[path](x) - linears[path].bias
        torch.testing.assert_close(ours, x @ by_comfyui.T, rtol=1e-4, atol=1e-4)
    again = read_adapter(tmp_path / "out.safetensors").adapter
    assert all(delta.base_norm for delta in again.values())
    back = {path: delta.suited("native", weights[path]) for path, delta in again.items()}
    assert compare(dora, back)[0] < 1e-5
    export(
        tmp_path / "out.safetensors",
        tmp_path / "diffusers.safetensors",
        model=str(base),
        format="diffusers",
        dtype="fp32",
    )
    assert compare(dora, read_adapter(tmp_path / "diffusers.safetensors").adapter)[0] < 1e-5


@pytest.mark.parametrize(("what", "message"), [("empty", "holds no adapter"), ("nothing", "no such run")])
def test_folders_without_adapters_are_refused(tmp_path, what, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        export(tmp_path / what, tmp_path / "out.safetensors")
    assert report_of(tmp_path / "out.safetensors")["exit_code"] == 3


def test_a_refused_export_leaves_the_report_of_the_file_that_is_there(run, tmp_path):
    out = tmp_path / "out.safetensors"
    report = export(run, out)
    with pytest.raises(InputError):
        export(tmp_path / "nothing", out)
    assert report_of(out) == report
    assert report_of(tmp_path / "out.safetensors.refused")["exit_code"] == 3
    export(run, out)
    assert not (tmp_path / "out.safetensors.refused.report.json").exists()


def test_large_or_foreign_thumbnails_are_refused(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        export(run, tmp_path / "out.safetensors", thumbnail=tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(PNG + bytes(2 << 20))
    with pytest.raises(InputError, match="1 MiB"):
        export(run, tmp_path / "out.safetensors", thumbnail=tmp_path / "a.png")


def test_a_strength_is_written_into_the_file(run, tmp_path):
    export(run, tmp_path / "half.safetensors", multiplier=0.5, dtype="fp32")
    half, whole = read_adapter(tmp_path / "half.safetensors"), read_adapter(run / "final" / "adapter.safetensors")
    assert half.adapter.keys() == whole.adapter.keys() and half.metadata["sd3pipe_multiplier"] == "0.5"
    for path, delta in whole.adapter.items():
        torch.testing.assert_close(half.adapter[path].dense(), 0.5 * delta.dense())


def test_options_that_would_be_ignored_are_refused(run, tmp_path):
    with pytest.raises(ValidationError, match="--metadata none leaves no place for --metadata-title"):
        export(run, tmp_path / "a.safetensors", metadata="none", metadata_title="Cat")


def test_an_adapter_is_not_exported_over_itself(run):
    file = run / "checkpoints" / "step-00000010" / "adapter.safetensors"
    with pytest.raises(ParameterError, match="choose another name"):
        export(run / "checkpoints" / "step-00000010", file)


def test_a_misspelt_name_and_a_folder_of_files_get_a_hint(run, tmp_path):
    with pytest.raises(InputError, match=r"did you mean .*/cat\?"):
        export(tmp_path / "catt", tmp_path / "a.safetensors")
    save_adapter(tmp_path / "loras" / "cat.safetensors", random_adapter(ARCHITECTURE, every=9))
    with pytest.raises(InputError, match=r"such as .*loras/cat\.safetensors"):
        export(tmp_path / "loras", tmp_path / "a.safetensors")
