"""`sd3pipe plan` reads headers alone, at the real size, and answers as text or JSON."""

import json
import re
import struct

import pytest
from PIL import Image
from support.public_models import PUBLIC_ARCHITECTURES

from sd3pipe import cli
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.weights import adapter_weights
from sd3pipe.demo.base_files import MODEL, TOKENIZERS
from sd3pipe.models import row_sizes
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.plan import PlanParams
from sd3pipe.params.train import TrainParams


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A sparse file of the real size: a genuine header, and a hole of 16 GB."""
    header, end = {}, 0
    shapes = MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True).shapes()
    for key, shape in shapes.items():
        size = 2
        for axis in shape:
            size *= axis
        header[f"model.diffusion_model.{key}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = tmp_path_factory.mktemp("model") / "sd3.5_large.safetensors"
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
    return file


@pytest.mark.long
def test_text_names_what_fits(large_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no project, so no dataset's size
    assert cli.run(["plan", "--model", str(large_file), "--vram", "12GB", "--ram", "32GB", "--tflops", "60"]) == 0
    text = capsys.readouterr().out
    assert "sd35-large: 8.15 billion weights in 38 blocks; 1024 x 1024 pixels" in text
    assert "--blocks-to-swap 38 --gradient-checkpointing on --base-dtype nf4" in text
    assert "fits 12 GB and 32 GB of host memory: --blocks-to-swap" in text
    assert text.count("or, with less: --blocks-to-swap") == 2


@pytest.mark.parametrize("option", ["base_dtype", "matmul_dtype"])
def test_rows_are_in_the_wanted_format_alone(large_file, capsys, option):
    assert cli.run(["plan", "--model", str(large_file), f"--{option.replace('_', '-')}", "int8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    assert [(row["base_format"], row["blocks_to_swap"]) for row in rows] == [("int8", 0), ("int8", 19), ("int8", 38)]


def test_json_holds_every_part(large_file, capsys):
    arguments = ["plan", "--model", str(large_file), "--blocks-to-swap", "38", "--gradient-checkpointing"]
    arguments += ["--vram", "8", "--json"]
    assert cli.run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    (row,) = answer["settings"]
    assert answer["blocks"] == 38
    assert row["blocks_to_swap"] == 38
    assert row["device_bytes"] == sum(row["device_parts"].values()) < 6e9
    assert row["seconds_per_step"] is None  # no --tflops
    assert answer["fits"] == row


@pytest.mark.parametrize(("dim", "factor"), [(16, -1), (256, -1), (100_000, 8)])
def test_an_adapter_is_counted_as_train_has_it(large_file, tmp_path, capsys, monkeypatch, dim, factor):
    """A rank that no layer has asks a LoKr for whole factors; lokr_factor stands in the file of the training."""
    monkeypatch.chdir(tmp_path)
    names = ("caches", "run", "export")
    (tmp_path / "project.toml").write_text("[paths]\n" + "".join(f'{name} = "{name}"\n' for name in names))
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train.toml").write_text(f'adapter_type = "lokr"\nnetwork_args = ["lokr_factor={factor}"]\n')
    arguments = ["plan", "--model", str(large_file), "--blocks-to-swap", "0", "--network-dim", str(dim), "--json"]
    assert cli.run(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["settings"]
    spec = AdapterSpec(algorithm="lokr", rank=dim, lokr_factor=factor)
    weights = adapter_weights(PUBLIC_ARCHITECTURES["sd35-large"].linear_sizes(), spec)
    assert row["device_parts"]["adapter and optimizer"] == 16 * weights < 2.1e9


def test_a_card_that_is_too_small_is_said_so(large_file, capsys):
    assert cli.run(["plan", "--model", str(large_file), "--vram", "1GB"]) == 0
    assert "nothing fits 1 GB" in capsys.readouterr().out


def test_more_blocks_than_there_are_exits_2(large_file, capsys):
    assert cli.run(["plan", "--model", str(large_file), "--blocks-to-swap", "39"]) == 2
    assert "the model has 38 blocks" in capsys.readouterr().err
    assert cli.run(["plan", "--model", str(large_file), "--vram", "much"]) == 2
    assert "12GB" in capsys.readouterr().err


def test_a_dataset_adds_the_disk_space_of_its_caches(large_file, tmp_path, capsys, monkeypatch):
    """Two pictures of 64 x 64 give 2 x 64 latents of 16 channels, mean and variance, in 16 bit; two captions and "".

    Equal pictures would share a row. The VAE and the text encoders are not here, so the published ones count.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name, level in (("a", 0), ("b", 9)):
        Image.new("L", (64, 64), level).save(tmp_path / f"pictures/{name}.png")
        (tmp_path / f"pictures/{name}.txt").write_text(name)
    settings = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 64\n"
    (tmp_path / "dataset.toml").write_text(settings + '[[datasets.subsets]]\nimage_dir = "pictures"\n')
    arguments = ["plan", "--model", str(large_file), "--dataset", str(tmp_path / "dataset.toml"), "--json"]
    assert cli.run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    disk = answer["disk_bytes"]
    assert answer["size_px"] == [64, 64]  # and the dataset's pictures are what is planned for
    assert cli.run([*arguments, "--resolution", "512,768"]) == 0
    assert json.loads(capsys.readouterr().out)["size_px"] == [512, 768]
    text_row = 2 * (78 * (768 + 1280) + 256 * 4096) + 2 * 77 + 256
    assert disk == {"latents": 2 * 64 * 16 * 2 * 2, "text": 3 * text_row}


OF_TRAINING = {
    "train_batch_size": 4, "gradient_accumulation_steps": 2, "network_dim": 64, "adapter_type": "loha",
    "optimizer_type": "bitsandbytes.optim.AdamW8bit", "mixed_precision": "no", "gradient_checkpointing": 7,
    "blocks_to_swap": 30, "modulation": "resident", "activation_offload": True, "layer_major": True,
}  # fmt: skip
EITHER, OR = {"base_dtype": "int8"}, {"matmul_dtype": "int8", "matmul_rotation": False}


@pytest.mark.parametrize("packed", [EITHER, OR])
def test_in_a_project_a_step_is_that_of_its_training(large_file, tmp_path, capsys, monkeypatch, packed):
    monkeypatch.chdir(tmp_path)
    paths, values = {"model", "mmdit"}, {**OF_TRAINING, **packed}
    assert {*OF_TRAINING, *EITHER, *OR} == (PlanParams.model_fields.keys() & TrainParams.model_fields.keys()) - paths
    plan = ["plan", "--model", str(large_file), "--vram", "12GB", "--json"]
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        words.append(f"--{option}={value}" if type(value) is not bool else f"--{option}" if value else f"--no-{option}")
    assert cli.run([*plan, *words]) == 0
    as_typed = json.loads(capsys.readouterr().out)
    names = ("caches", "run", "export")
    (tmp_path / "project.toml").write_text("[paths]\n" + "".join(f'{name} = "{name}"\n' for name in names))
    (tmp_path / "stages").mkdir()
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
    (tmp_path / "stages" / "train.toml").write_text('mmdit = "elsewhere.safetensors"\n' + "".join(lines))
    assert cli.run(plan) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == as_typed["settings"]


STAGE_FILES = {
    "as a new project has them": ({}, {}),
    "more and wider": (
        {"crop_variants": 12, "latent_dtype": "float32"},
        {"t5xxl_max_token_length": 77, "text_dtype": "float32", "caption_variants": 3},
    ),
    "fewer": ({"crop_variants": 2, "latent_mode": "mean"}, {"t5_pad_to": 77}),
    "packed": ({}, {"t5xxl_row_dtype": "int8"}),
}


@pytest.mark.long
@pytest.mark.parametrize("stage_files", STAGE_FILES.values(), ids=STAGE_FILES)
def test_plan_says_of_a_dataset_what_the_dry_runs_of_the_encode_stages_say(stage_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (64 + 32 * number, 64), (number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"one, two, {number}")
    (tmp_path / "dataset.toml").write_text(
        "[general]\nresolution = 64\nrandom_crop = true\nflip_aug = true\nshuffle_caption = true\n"
        'enable_bucket = true\nmin_bucket_reso = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pictures"\n'
    )
    (tmp_path / "project.toml").write_text(
        f'[paths]\nmodel = "{MODEL}"\ntokenizers = "{TOKENIZERS}"\ndataset = "dataset.toml"\ncaches = "caches"\n'
    )
    (tmp_path / "stages").mkdir()
    for name, values in zip(("encode_latents", "encode_text"), stage_files, strict=True):
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
        (tmp_path / f"stages/{name}.toml").write_text("".join(lines))
    monkeypatch.setattr(row_sizes, "_MUCH_TEXT", 0)
    assert cli.run(["plan"]) == 0
    planned = capsys.readouterr().out.splitlines()
    packed = "t5xxl_row_dtype" in stage_files[1]
    assert planned[2].startswith("settings" if packed else "disk: text takes ")
    assert cli.run(["encode-latents", "--dry-run"]) == 0
    latents = _to_write(capsys.readouterr().out)
    assert cli.run(["encode-text", "--dry-run"]) == 0
    assert planned[1] == f"disk: text {_to_write(capsys.readouterr().out)}, latents {latents}"


def _to_write(said):
    return re.search(r"([\d.]+ \w+) to write", said)[1]
