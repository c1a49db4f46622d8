"""What comes from names, captions and metadata reaches a terminal as text: no escape sequence, no markup of rich."""

import errno
import io
import json
import logging
import os
import sys

import pytest
from support.fake_cache import captions, fill, wanted_texts
from support.random_adapters import random_adapter
from support.tiny_mmdit import tiny_architecture

from sd3pipe import console
from sd3pipe.adapters.files import save_adapter
from sd3pipe.cli import run

HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold]\n\x9b31m\u202ered"
SHOWN = r"\x1b]0;owned\x07\x1b[2J[bold]\n\x9b31m\u202ered"


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / f"{HOSTILE}.safetensors"
    save_adapter(path, random_adapter(tiny_architecture("sd35-medium")), metadata={HOSTILE: HOSTILE})
    return path


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / HOSTILE / "text"
    wanted = wanted_texts(captions(3), subsets={HOSTILE: {HOSTILE: HOSTILE}})
    fill(path, wanted, unreadable={"picture number 1": HOSTILE})
    return path


def inert(text):
    return all(char == "\n" or char.isprintable() for char in text)


def told(capfd, *arguments, code=0):
    """Returns what a command wrote to the terminal, which must be nothing but text."""
    assert run([str(argument) for argument in arguments]) == code
    out, err = capfd.readouterr()
    assert inert(out) and inert(err)
    return out + err


def test_metadata_and_names_of_adapters(capfd, adapter, tmp_path):
    assert f"{SHOWN}: {SHOWN}\n" in told(capfd, "adapter", "inspect", adapter)
    assert "\\u001b]0;owned" in told(capfd, "adapter", "inspect", adapter, "--json")
    assert SHOWN in told(capfd, "export", "--adapter", adapter, "--out", tmp_path / f"out{HOSTILE}.safetensors")


def test_names_in_caches(capfd, cache):
    listed = told(capfd, "cache", "ls", cache)
    assert f"subset {SHOWN}" in listed and f"{SHOWN} {SHOWN}" in listed
    told(capfd, "cache", "ls", cache, "--json")
    told(capfd, "cache", "verify", cache.parent / f"none{HOSTILE}", code=3)


def test_paths_in_the_lines_of_run(capfd, tmp_path, monkeypatch):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    paths = {"model": "m.safetensors", "dataset": "d.toml", "caches": f"{HOSTILE}/caches", "run": "r", "export": "e"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in paths.items()]
    (folder / "project.toml").write_text("\n".join(["[paths]", *lines]), encoding="utf-8")
    monkeypatch.chdir(folder)
    assert run(["run", "--dry-run"]) in (0, 2, 3)
    out, err = capfd.readouterr()
    assert inert(out + err) and "owned" in out + err


def test_log_lines(capfd):
    console.setup_logging()
    logging.getLogger("sd3pipe.training").warning("%s: left out: %s", HOSTILE, "[red]no[/]")
    assert capfd.readouterr().err == f"warning: {SHOWN}: left out: [red]no[/]\n"


def test_tables_and_bars_read_no_markup(capfd, monkeypatch):
    console.say_table([(HOSTILE, "ok", "[green]x[/]")], {"ok": "green"})
    out = capfd.readouterr().out
    assert inert(out) and "[bold]" in out and "[green]x[/]" in out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress("[bold]title", 2, "rows") as bar:
        bar.advance(2, name="[red]x[/]")
    err = capfd.readouterr().err
    assert "[bold]title" in err and "[red]x[/]" in err


def test_lines_for_another_program_are_handed_over_as_they_are(capfdbinary, monkeypatch):
    name = os.fsdecode(b"caf\xe9\x1b")
    with open(1, "w", encoding="utf-8", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        console.hand_over([name, "plain"])
        stdout.flush()
        assert capfdbinary.readouterr().out == b"caf\xe9\x1b\nplain\n"
        monkeypatch.setattr(stdout, "isatty", lambda: True)
        console.hand_over([name])
        monkeypatch.undo()
    assert capfdbinary.readouterr().out == rb"caf\udce9\x1b" + b"\n"


def test_json_has_no_control_character(capfd):
    console.say_json({"a\x7f": HOSTILE})
    out = capfd.readouterr().out
    assert inert(out) and json.loads(out) == {"a\x7f": HOSTILE}


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["cache", "ls", "x"]) == 3
    assert "the current folder is not there any more" in capsys.readouterr().err


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_that_a_full_disk_does_not_take_is_no_bug_of_ours(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "text", wanted_texts(captions(3)))
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert run(["cache", "ls", str(tmp_path / "text")]) == 7
    assert capsys.readouterr().err == "error: the output cannot be written: the disk is full\n"
