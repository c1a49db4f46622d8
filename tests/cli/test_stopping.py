"""Ctrl-C and SIGTERM end a command with exit code 75 and one line, and reach the command that another one runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sd3pipe import cli
from sd3pipe.child import ChildFailed
from sd3pipe.commands import doctor
from sd3pipe.training.stopping import StopRequest

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """A shell starts what it puts in the background to ignore Ctrl-C; the tests must not depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@BOTH
def test_a_signal_ends_a_command_with_one_line(monkeypatch, capsys, number):
    before = signal.getsignal(number)

    def killed(params):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(doctor, "main", killed)
    assert cli.run(["doctor"]) == 75
    assert capsys.readouterr().err == f"error: stopped by {number.name}: the same command goes on from here\n"
    assert signal.getsignal(number) is before


def test_what_was_started_to_ignore_ctrl_c_goes_on_ignoring_it(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(doctor, "main", lambda params: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert cli.run(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.5)  # longer than subprocess waits before it kills
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(30)
"""


@BOTH
@pytest.mark.parametrize("to", ["process", "group"])
def test_a_signal_is_handed_on_and_the_command_may_finish(tmp_path, number, to):
    (tmp_path / "sd3pipe").mkdir()
    (tmp_path / "sd3pipe" / "__init__.py").touch()
    (tmp_path / "sd3pipe" / "__main__.py").write_text(CHILD)
    parent = (
        f"from sd3pipe.child import run_child; from pathlib import Path; print(run_child([], Path({str(tmp_path)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to == "group" else os.kill)(process.pid, number)
    assert process.stdout.read() == "75\n"


def test_a_failed_command_gives_its_code_and_a_killed_one_may_go_on():
    assert ChildFailed("train", 7, "sd3pipe run").exit_code == 7
    killed = ChildFailed("train", -9, "sd3pipe run")
    assert (killed.exit_code, str(killed)) == (75, "train was ended by signal 9: `sd3pipe run` goes on from there")


def test_the_same_wish_said_twice_at_once_counts_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
