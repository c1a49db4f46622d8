"""sd-scripts' own documented example, its config files and its folders become a project that does the same."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import forked, sd3pipe
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

from sd3pipe import cli
from sd3pipe.commands.from_kohya import main
from sd3pipe.errors import ParameterError
from sd3pipe.params.from_kohya import FromKohyaParams
from sd3pipe.params.sd_scripts import OPTIONS
from sd3pipe.project.kohya import Translation, translate
from sd3pipe.project.kohya_dataset import dataset_blocks
from sd3pipe.project.kohya_source import read_command, read_source

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


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with two pictures as --train_data_dir wants them and an adapter."""
    (tmp_path / "td" / "10_sks cat").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (40 * number, 90, 30)).save(tmp_path / "td" / "10_sks cat" / f"{number}.png")
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "prompts.txt").write_text("a cat --d 1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def translated(*words: str, **options) -> dict[str, str]:
    """Translates a command with the pictures of `here`, and returns the texts of the project by name."""
    number = len(list(Path().glob("project-*")))
    out = Path(f"project-{number}")
    source = ("sd3_train_network.py", "--train_data_dir=td", "--resolution=64", *words)
    main(FromKohyaParams(source=source, out=out, **options))
    return {str(file.relative_to(out)): file.read_text() for file in sorted(out.rglob("*")) if file.is_file()}


def values(texts: dict[str, str], stage: str) -> dict:
    return tomllib.loads(texts[f"stages/{stage}.toml"])


def translation(text: str) -> Translation:
    return translate(read_command(f"sd3_train_network.py {text}"))


def stage_values(folder: Path, stage: str) -> dict:
    return tomllib.loads((folder / "stages" / f"{stage}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("given", "written", "scheduler"),
    [
        ([], ["relative_step=True", "scale_parameter=True"], "constant"),
        (
            ["relative_step=False", "warmup_init=False"],
            ["relative_step=False", "warmup_init=False", "scale_parameter=True"],
            "cosine",
        ),
        (["scale_parameter=False", "relative_step=False"], ["scale_parameter=False", "relative_step=False"], "cosine"),
    ],
)
def test_adafactor_gets_the_arguments_and_the_schedule_that_sd_scripts_sets(given, written, scheduler):
    options = {"optimizer_type": "AdaFactor", "lr_scheduler": "cosine", **({"optimizer_args": given} if given else {})}
    train = translate(options).values["train"]
    assert train["optimizer_args"] == written
    assert train["lr_scheduler"] == scheduler


def test_an_optimizer_of_a_package_is_said_to_need_the_user_s_word():
    lines = translate({"optimizer_type": "pytorch_optimizer.CAME"}).changed
    assert any("optimizer_type = pytorch_optimizer.CAME" in line and "--allow-code" in line for line in lines)
    assert not any("--allow-code" in line for line in translate({}).changed)


def test_documented_example_is_translated_value_by_value(command, tmp_path):
    done = forked("from-kohya", command, "--out", tmp_path / "project")
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
    assert lines[0] == "Not done here:" and "CLIP-L and CLIP-G" in lines[1]
    assert "networks.lora: fails for SD3 in sd-scripts" in done.stdout
    assert "blocks_to_swap = 32: the model has 2 blocks" in done.stdout


def test_dataset_file_keeps_its_meaning_with_defaults_written_out(command, tmp_path):
    forked("from-kohya", command, "--out", tmp_path / "project")
    tables = tomllib.loads((tmp_path / "project" / "dataset.toml").read_text())
    assert tables["general"]["caption_extension"] == ".txt"
    assert tables["general"]["enable_bucket"] is False
    assert "batch_size" not in tables["datasets"][0]
    assert tables["datasets"][0]["subsets"][0]["num_repeats"] == 3


@pytest.mark.parametrize(
    ("general", "first", "second", "option", "size", "told"),
    [
        ("", "batch_size = 4", "", (), 4, "[1, 4]"),
        ("", "batch_size = 4", "", ("--train_batch_size", "2"), 4, "[2, 4]"),
        ("batch_size = 3", "", "", ("--train_batch_size", "2"), 3, ""),
        ("batch_size = 3", "batch_size = 4", "batch_size = 4", (), 4, ""),
        ("", "", "", ("--train_batch_size", "2"), 2, ""),
    ],
)
def test_one_batch_size_serves_all_and_others_are_told(here, general, first, second, option, size, told):
    subset = '[[datasets.subsets]]\nimage_dir = "td/10_sks cat"\n'
    tables = (f"[[datasets]]\nresolution = 64\n{own}\n{subset}" for own in (first, second))
    (here / "d.toml").write_text(f"[general]\n{general}\n" + "".join(tables))
    given = read_source(["sd3_train_network.py", "--dataset_config", "d.toml", *option])
    translation = translate(given)
    dataset_blocks(given, translation)
    assert translation.values["train"]["train_batch_size"] == size
    lines = [line for line in translation.changed if line.startswith("batch_size: ")]
    assert len(lines) == bool(told) and all(told in line for line in lines)


def test_every_default_of_sd_scripts_is_written_out(here):
    texts = translated()
    for name, row in OPTIONS.items():
        for place in row.places:
            if row.default is None or place.value is not None or place.file == "dataset":
                continue
            if name in ("huber_c", "huber_scale", "huber_schedule"):  # of other losses
                continue
            assert values(texts, place.file)[place.key] == row.default, name
    general = tomllib.loads(texts["dataset.toml"])["general"]
    assert (general["caption_extension"], general["enable_bucket"], general["max_bucket_reso"]) == (
        ".caption", False, 1024,
    )  # fmt: skip


def test_options_without_effect_are_counted_and_explained_on_request(here, capsys):
    translated("--min_snr_gamma=5", "--noise_offset=0.1", "--network_train_unet_only")
    short = capsys.readouterr().out
    assert "Without effect: 3 options (min_snr_gamma, noise_offset, network_train_unet_only); --all says why" in short
    assert "Not done here" not in short
    translated("--min_snr_gamma=5", "--noise_offset=0.1", all=True)
    assert capsys.readouterr().out.count("ignores it") == 2


def test_misspelt_option_names_the_nearest():
    assert any("did you mean network_dim?" in line for line in translation("--network_dmi 4").lost)


def test_another_script_is_refused():
    with pytest.raises(ParameterError, match="sdxl_train_network"):
        read_command("accelerate launch sdxl_train_network.py --network_dim 4")


def test_modernize_takes_our_defaults_for_what_was_not_said(command, tmp_path):
    done = forked("from-kohya", command, "--out", tmp_path / "project", "--modernize")
    train = stage_values(tmp_path / "project", "train")
    assert train["loss_form"] == "velocity"
    assert train["learning_rate"] == 1e-4  # said
    assert "sd3pipe's default, instead of" in done.stdout


def test_train_data_dir_folders_become_subsets(tmp_path):
    write_photographs(tmp_path / "data" / "10_cat", ("chelsea.png",), 96)
    text = (
        f"sd3_train_network.py --train_data_dir {tmp_path / 'data'} --resolution 64 --pretrained_model_name_or_path m"
    )
    forked("from-kohya", text, "--out", tmp_path / "project")
    tables = tomllib.loads((tmp_path / "project" / "dataset.toml").read_text())
    subset = tables["datasets"][0]["subsets"][0]
    assert (subset["num_repeats"], subset["class_tokens"]) == (10, "cat")


def test_a_command_without_quotes_is_answered_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["accelerate", "launch", "sd3_train_network.py", "--network_dim", "4"]
    assert cli.run(["from-kohya", *words]) == 2
    assert "--network-dim: is no option of from-kohya: put the command in quotes" in capsys.readouterr().err
    assert cli.run(["from-kohya", "--", *words]) == 2
    assert "the command names no pictures" in capsys.readouterr().err


def test_nothing_is_overwritten(command, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "dataset.toml").write_text("mine")
    assert "not overwritten" in forked("from-kohya", command, "--out", tmp_path / "project", expect=2).stderr
    assert (tmp_path / "project" / "dataset.toml").read_text() == "mine"


def test_pictures_of_the_command_are_deps_of_dvc(command, tmp_path):
    forked("from-kohya", command, "--out", tmp_path / "project")
    text = (tmp_path / "project" / "dvc.yaml").read_text()
    assert text.count(f"- {tmp_path / 'images'}\n") == 2  # of encode_text and encode_latents
    assert ".sd3pipe/" in (tmp_path / "project" / ".dvcignore").read_text()


@pytest.mark.slow
def test_documented_example_runs_on_the_tiny_model(command, tmp_path):
    """fp16 with a loss scale, 8-bit AdamW, checkpointing and every block streamed, as the command says."""
    tokenizers = {"SD3PIPE_TOKENIZERS": str(tmp_path / "base" / "tokenizers")}
    forked("from-kohya", command, "--out", tmp_path / "project")
    done = sd3pipe("run", cwd=tmp_path / "project", env=tokenizers)
    assert "train: 20 steps" in done.stdout  # 3 repeats in batches of 2, ten times
    assert (tmp_path / "O" / "my_sd3_lora.safetensors").is_file()
