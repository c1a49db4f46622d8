"""The bridge to Typer: spellings, lists, help, exit codes; nothing of it declares an option twice."""

from typing import Literal

import pytest

from sd3pipe import cli
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


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_command_shows_its_help(command, capsys):
    assert cli.run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: sd3pipe " + command in shown


def test_unknown_command_is_a_parameter_error(capsys):
    assert cli.run(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


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
