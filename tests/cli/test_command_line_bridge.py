"""The bridge to Typer: spellings, lists, help, exit codes; nothing of it declares an option twice."""

import errno
from typing import Literal

import pytest

from sd3pipe import cli
from sd3pipe.console import version
from sd3pipe.params.command_line import normalise, signature
from sd3pipe.params.fields import OptionPath, Params, option


class ToyParams(Params):
    out: OptionPath = option(..., "Folder.", role="path", aliases=("output_dir",))
    network_args: tuple[str, ...] = option((), "Arguments.")
    network_dim: int = option(16, "Rank [of the adapter].")
    deterministic: bool = option(False, "Equal bits.", advanced=True)
    scheme: Literal["a", "b", "c", "d", "e"] = option("a", "Scheme.")
    cache: OptionPath = option(..., "Cache.", positional=True, role="path")


def test_aliases_and_underscores_become_the_one_spelling():
    assert normalise(ToyParams, ["--output_dir", "x", "--network_dim=4"]) == ["--out", "x", "--network-dim=4"]


def test_lists_may_be_written_behind_one_option():
    assert normalise(ToyParams, ["--network_args", "a=1", "b=2", "--out", "x"]) == [
        "--network-args", "a=1", "--network-args", "b=2", "--out", "x",
    ]  # fmt: skip


def test_positional_arguments_come_first_and_advanced_options_are_hidden():
    parameters = signature(ToyParams, show_all=False).parameters
    assert next(iter(parameters)) == "cache"
    assert parameters["deterministic"].annotation.__metadata__[0].hidden
    assert not signature(ToyParams, show_all=True).parameters["deterministic"].annotation.__metadata__[0].hidden


def test_help_shows_defaults_and_escapes_brackets():
    infos = {name: p.annotation.__metadata__[0] for name, p in signature(ToyParams, show_all=True).parameters.items()}
    assert infos["network_dim"].help == "Rank \\[of the adapter]. \\[default: 16]"
    assert infos["scheme"].metavar == "CHOICE"
    assert "one of a, b, c, d, e" in infos["scheme"].help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_its_help(command, capsys):
    assert cli.run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: sd3pipe " + command in shown


def test_unknown_command_is_a_parameter_error(capsys):
    assert cli.run(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_an_option_is_named_as_it_was_typed(capsys, tmp_path):
    assert cli.run(["init", str(tmp_path / "new"), "--for=nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: --for nonsense: must be")


def test_what_stands_before_a_command_is_the_programs_own(capsys):
    assert cli.run(["--version", "train"]) == 0
    assert capsys.readouterr().out == f"{version()}\n"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "a\nb"])
def test_a_name_is_one_name_in_a_folder(name, capsys):
    assert cli.run(["init", "new", "--name", name]) == 2
    assert "is no name of a file" in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_is_no_bug(monkeypatch):
    def write(text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "say", write)
    assert cli.run(["--version"]) == 141


def test_version_is_shown(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_bug_keeps_its_traceback_in_a_file(capsys, monkeypatch):
    monkeypatch.setattr("sd3pipe.commands.doctor._disk", lambda folder: 1 / 0)
    assert cli.run(["doctor"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    path = line.rsplit(" ", 1)[-1]
    with open(path) as file:
        assert "ZeroDivisionError" in file.read()


@pytest.mark.parametrize("word, expected", [("--torch-compile", True), ("--no-torch-compile", False), (None, None)])
def test_a_switch_with_a_default_of_its_own_takes_no_value(word, expected, monkeypatch):
    seen = []
    monkeypatch.setattr("sd3pipe.commands.train.main", seen.append)
    words = ["train", "--model=m", "--text=t", "--latents=l", "--out=o", *([word] if word else [])]
    assert cli.run(words) == 0
    assert seen[0].torch_compile is expected


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--gradient_checkpointing"], "on"),
        (["--gradient-checkpointing", "--seed", "1"], "on"),
        (["--gradient_checkpointing=true"], "on"),
        (["--gradient-checkpointing", "false"], "off"),
        (["--no-gradient-checkpointing"], "off"),
        (["--gradient-checkpointing", "0"], "off"),
        (["--gradient-checkpointing", "7"], 7),
    ],
)
def test_a_switch_that_takes_a_value_may_stand_without_one(words, expected, monkeypatch):
    seen = []
    monkeypatch.setattr("sd3pipe.commands.train.main", seen.append)
    assert cli.run(["train", "--model=m", "--text=t", "--latents=l", "--out=o", *words]) == 0
    assert seen[0].gradient_checkpointing == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--noise_offset", "0.1"], "--noise-offset: not supported: sd-scripts accepts it for SD3 and ignores it"),
        (["--cache_latents=false"], "--cache-latents: the encode stages always write a cache on disk: remove the key"),
        (["--flip_aug"], "--flip-aug: it belongs in dataset.toml"),
        (["--image_dir", "x"], "--image-dir: it belongs in dataset.toml"),
        (["--fp8_base"], '--fp8-base: say base_dtype = "fp8" in stages/train.toml'),
        (["--t5xxl_max_token_length=77"], "--t5xxl-max-token-length: belongs to the stage encode-text"),
        (["--network_dmi", "4"], "--network-dmi: unknown option (did you mean network_dim?)"),
        (["--caption_dropout_rte=1"], "(did you mean caption_dropout_rate? it belongs in dataset.toml)"),
        (["--sdpa", "--seed", "word"], "--sdpa: attention always runs through torch's scaled_dot_product_attention"),
        (["--dry-run"], "error: --dry-run: `sd3pipe run --dry-run` checks every stage"),
        (["--xformers", "--seed=word"], "--seed word: must be a valid integer"),
    ],
)
def test_words_that_are_no_option_of_a_stage_get_the_answer_that_files_get(words, line, capsys):
    assert cli.run(["train", "--model=m", "--text=t", "--latents=l", "--out=o", *words]) == 2
    assert line in capsys.readouterr().err


def test_a_wish_that_is_met_anyway_is_taken_with_its_value(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sd3pipe.commands.train.main", seen.append)
    words = ["--sdpa", "--network_module", "networks.lora_sd3", "--network_dim=4", "--save_model_as=safetensors"]
    assert cli.run(["train", "--model=m", "--text=t", "--latents=l", "--out=o", *words]) == 0
    assert seen[0].network_dim == 4
    assert capsys.readouterr().err.count("\n") == 3


def test_words_behind_two_dashes_stay_as_they_are():
    assert normalise(ToyParams, ["--network_dim=4", "--", "--output_dir", "a_b"]) == [
        "--network-dim=4", "--", "--output_dir", "a_b",
    ]  # fmt: skip
