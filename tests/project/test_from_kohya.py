"""sd-scripts' own documented example, its config files and its folders become a project that does the same."""

import tomllib
from pathlib import Path

import pytest
from support.command_line import sd3pipe
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

from sd3pipe.errors import ParameterError
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.project.kohya import read_command, translate
from sd3pipe.project.kohya_options import TRAIN_OPTIONS

DOCUMENTED = """accelerate launch \\
  --num_cpu_threads_per_process 1 sd3_train_network.py \\
  --pretrained_model_name_or_path="{model}" \\
  --clip_l="{clip_l}" \\
  --clip_g="{clip_g}" \\
  --t5xxl="{t5xxl}" \\
  --dataset_config="{dataset}" \\
  --output_dir="{out}" \\
  --output_name="my_sd3_lora" \\
  --save_model_as=safetensors \\
  --network_module=networks.lora \\
  --network_dim=16 --network_alpha=1 --learning_rate=1e-4 \\
  --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa \\
  --max_train_epochs=10 --save_every_n_epochs=1 \\
  --mixed_precision="fp16" --gradient_checkpointing \\
  --weighting_scheme="sigma_sqrt" --blocks_to_swap=32"""


@pytest.fixture
def command(tmp_path) -> str:
    base = write_tiny_base(tmp_path / "base", variant="sd35-medium", layout="separate")
    write_photographs(tmp_path / "images", ("chelsea.png",), 96)
    dataset = tmp_path / "my_sd3_dataset_config.toml"
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "images"}"\nnum_repeats = 3\n'
    )
    return DOCUMENTED.format(
        model=base.model, clip_l=base.clip_l, clip_g=base.clip_g, t5xxl=base.t5xxl, dataset=dataset, out=tmp_path / "O"
    )


def stage_values(folder: Path, stage: str) -> dict:
    return tomllib.loads((folder / "stages" / f"{stage}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([], ["relative_step=True", "scale_parameter=True"]),
        (
            ["relative_step=False", "warmup_init=False"],
            ["relative_step=False", "warmup_init=False", "scale_parameter=True"],
        ),
        (["scale_parameter=False", "relative_step=False"], ["scale_parameter=False", "relative_step=False"]),
    ],
)
def test_adafactor_gets_the_arguments_that_sd_scripts_sets(given, written):
    options = {"optimizer_type": "AdaFactor", **({"optimizer_args": given} if given else {})}
    train = translate(options, load_stage_models()).values["train"]
    assert train["optimizer_args"] == written


def test_an_optimizer_of_a_package_is_said_to_need_the_user_s_word():
    lines = translate({"optimizer_type": "pytorch_optimizer.CAME"}, load_stage_models()).changed
    assert any("optimizer_type = pytorch_optimizer.CAME" in line and "--allow-code" in line for line in lines)
    assert not any("--allow-code" in line for line in translate({}, load_stage_models()).changed)


def test_documented_example_is_translated_value_by_value(command, tmp_path):
    done = sd3pipe("from-kohya", command, "--out", tmp_path / "project")
    train = stage_values(tmp_path / "project", "train")
    assert train["network_dim"] == 16 and train["network_alpha"] == 1
    assert train["learning_rate"] == 1e-4 and train["optimizer_type"] == "AdamW8bit"
    assert (train["loss_form"], train["weighting_scheme"], train["training_shift"]) == ("x0", "sigma_sqrt", 1.0)
    assert train["train_batch_size"] == 2  # of the dataset file
    assert train["max_train_epochs"] == 10
    assert train["mixed_precision"] == "fp16"
    paths = tomllib.loads((tmp_path / "project" / "project.toml").read_text())["paths"]
    assert paths["loras_dir"].endswith("O") and paths["run"] == "runs/my_sd3_lora"
    lines = done.stdout.splitlines()
    assert lines[0] == "Not trained any more:" and "CLIP-L and CLIP-G" in lines[1]
    assert "networks.lora: fails for SD3 in sd-scripts" in done.stdout
    assert "blocks_to_swap = 32: the model has 2 blocks" in done.stdout


def test_dataset_file_keeps_its_meaning_with_defaults_written_out(command, tmp_path):
    sd3pipe("from-kohya", command, "--out", tmp_path / "project")
    tables = tomllib.loads((tmp_path / "project" / "dataset.toml").read_text())
    assert tables["general"]["caption_extension"] == ".txt"
    assert tables["general"]["enable_bucket"] is False
    assert "batch_size" not in tables["datasets"][0]
    assert tables["datasets"][0]["subsets"][0]["num_repeats"] == 3


def test_every_option_of_ours_that_sd_scripts_has_gets_its_default():
    stages = load_stage_models()
    translation = translate({"output_name": "x"}, stages)
    for key, option in TRAIN_OPTIONS.items():
        stage = next((name for name, model in stages.items() if key in model.model_fields), None)
        skipped = {"huber_c", "huber_scale", "huber_schedule", "masked_loss"}
        if stage is not None and option.default is not None and key not in skipped:
            assert key in translation.values[stage], key


def test_ignored_options_are_refused_with_the_reason():
    translation = translate(
        read_command("sd3_train_network.py --min_snr_gamma 5 --noise_offset=0.1 --network_train_unet_only"),
        load_stage_models(),
    )
    assert not translation.dropped
    assert len(translation.refused) == 2 and all("ignores it" in line for line in translation.refused)


def test_misspelt_option_names_the_nearest():
    translation = translate(read_command("sd3_train_network.py --network_dmi 4"), load_stage_models())
    assert "did you mean network_dim?" in translation.refused[0]


def test_another_script_is_refused():
    with pytest.raises(ParameterError, match="sdxl_train_network"):
        read_command("accelerate launch sdxl_train_network.py --network_dim 4")


def test_modernize_takes_our_defaults_for_what_was_not_said(command, tmp_path):
    done = sd3pipe("from-kohya", command, "--out", tmp_path / "project", "--modernize")
    train = stage_values(tmp_path / "project", "train")
    assert train["loss_form"] == "velocity"
    assert train["learning_rate"] == 1e-4  # said
    assert "sd3pipe's default, instead of" in done.stdout


def test_train_data_dir_folders_become_subsets(tmp_path):
    write_photographs(tmp_path / "data" / "10_cat", ("chelsea.png",), 96)
    text = (
        f"sd3_train_network.py --train_data_dir {tmp_path / 'data'} --resolution 64 --pretrained_model_name_or_path m"
    )
    sd3pipe("from-kohya", text, "--out", tmp_path / "project")
    tables = tomllib.loads((tmp_path / "project" / "dataset.toml").read_text())
    subset = tables["datasets"][0]["subsets"][0]
    assert (subset["num_repeats"], subset["class_tokens"]) == (10, "cat")


def test_nothing_is_overwritten(command, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "dataset.toml").write_text("mine")
    assert "not overwritten" in sd3pipe("from-kohya", command, "--out", tmp_path / "project", expect=2).stderr
    assert (tmp_path / "project" / "dataset.toml").read_text() == "mine"


def test_pictures_of_the_command_are_deps_of_dvc(command, tmp_path):
    sd3pipe("from-kohya", command, "--out", tmp_path / "project")
    text = (tmp_path / "project" / "dvc.yaml").read_text()
    assert text.count(f"- {tmp_path / 'images'}\n") == 2  # of encode_text and encode_latents
    assert ".sd3pipe/" in (tmp_path / "project" / ".dvcignore").read_text()


@pytest.mark.slow
def test_documented_example_runs_on_the_tiny_model(command, tmp_path):
    """fp16 with a loss scale, 8-bit AdamW, checkpointing and every block streamed, as the command says."""
    tokenizers = {"SD3PIPE_TOKENIZERS": str(tmp_path / "base" / "tokenizers")}
    sd3pipe("from-kohya", command, "--out", tmp_path / "project")
    done = sd3pipe("run", cwd=tmp_path / "project", env=tokenizers)
    assert "train: 20 steps" in done.stdout  # 3 repeats in batches of 2, ten times
    assert (tmp_path / "O" / "my_sd3_lora.safetensors").is_file()
