"""Ctrl-C, SIGTERM and SIGHUP end a command with exit code 75 and one line, and reach what another command runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd3pipe import cli, stopping
from sd3pipe.child import ChildFailed
from sd3pipe.commands import doctor
from sd3pipe.errors import Stopped

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """A shell starts what it puts in the background to ignore Ctrl-C; the tests must not depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_doctor(monkeypatch, program) -> int:
    """Runs a command line whose program is another one."""
    monkeypatch.setattr(doctor, "main", program)
    return cli.run(["doctor"])


def asked(number: int) -> None:
    """Sends a signal to this process, and goes on once the thread that watches for it has said so."""
    signal.raise_signal(number)
    time.sleep(0.2)


@BOTH
def test_a_signal_is_acknowledged_and_ends_a_command_at_its_next_look(monkeypatch, capsys, number):
    before = signal.getsignal(number)

    def program(params):
        asked(number)
        print("still at work")
        stopping.check()
        raise AssertionError("not stopped")

    assert run_doctor(monkeypatch, program) == 75
    said = capsys.readouterr()
    assert said.out == "still at work\n"
    assert said.err == (
        f"{number.name}: stopping after what is under way; once more ends at once\n"
        f"stopped by {number.name}: the same command goes on from here\n"
    )
    assert signal.getsignal(number) is before


def test_a_file_that_ends_is_no_wish_to_stop(monkeypatch, capsys):
    def program(params):
        raise EOFError("end of stream")

    assert run_doctor(monkeypatch, program) == 1
    assert "EOFError: end of stream: this is a bug" in capsys.readouterr().err


def test_a_library_that_catches_everything_does_not_swallow_the_wish(monkeypatch):
    def program(params):
        try:
            with stopping.breaking_off():
                asked(signal.SIGTERM)
        except Exception:
            pass
        stopping.check()

    assert run_doctor(monkeypatch, program) == 75


def test_waiting_for_others_is_broken_off_at_once(monkeypatch):
    def program(params):
        with stopping.breaking_off():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    start = time.monotonic()
    assert run_doctor(monkeypatch, program) == 75
    assert time.monotonic() - start < 10


def test_an_error_after_the_wish_is_no_bug_of_ours(monkeypatch, capsys):
    """A process beside this one may have been told, too, and be gone."""

    def program(params):
        asked(signal.SIGTERM)
        raise ConnectionResetError("the other one has left")

    assert run_doctor(monkeypatch, program) == 75
    assert "stopped by SIGTERM (ConnectionResetError: the other one has left)" in capsys.readouterr().err


def test_what_is_finished_all_the_same_counts_as_done(monkeypatch):
    assert run_doctor(monkeypatch, lambda params: asked(signal.SIGTERM)) == 0


def test_what_was_started_to_ignore_ctrl_c_goes_on_ignoring_it(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def program(params):
        asked(signal.SIGINT)
        stopping.check()

    try:
        assert run_doctor(monkeypatch, program) == 0
    finally:
        signal.signal(signal.SIGINT, before)


DEAF = """
import hashlib, sys, time
from sd3pipe import stopping
stopping.listen()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1) if "busy" in sys.argv else time.sleep(600)
"""


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("how", ["busy", "asleep"])
def test_a_second_signal_ends_what_does_not_answer(number, how):
    """Also where the main thread is in a library for half an hour: a handler would have to wait for it."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.readline().startswith(f"{number.name}: stopping after what is under way")
    process.send_signal(number)  # at once: the same wish
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number


ON_A_TERMINAL = """
import sys
from pathlib import Path
from sd3pipe import cli, stopping
from sd3pipe.commands import doctor

def program(params):
    print("ready", flush=True)
    while not stopping.reason():
        pass
    print("nobody reads this", flush=True)
    print("nor this", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("saved")
    stopping.check()

doctor.main = program
Path(sys.argv[2]).write_text(str(cli.run(["doctor"])))
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals to close")
def test_a_terminal_that_is_gone_leaves_time_to_save(tmp_path):
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL, tmp_path / "state", tmp_path / "code"])
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert ((tmp_path / "state").read_text(), (tmp_path / "code").read_text()) == ("saved", "75")


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.5)  # longer than subprocess waits before it kills
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
print("ready", flush=True)
time.sleep(30)
"""
PARENT = """
import sys
from pathlib import Path
from sd3pipe import child, stopping
child._PROGRAM = Path(sys.argv[1])
with stopping.listening():
    try:
        child.run_child("train", [], same_command="sd3pipe run")
    except child.Stopped as stopped:
        print(stopped)
"""


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("to", ["process", "group"])
def test_a_signal_is_handed_on_and_the_command_may_finish(tmp_path, number, to):
    program = tmp_path / "program.py"
    program.write_text(CHILD)
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to == "group" else os.kill)(process.pid, number)
    assert process.stdout.read() == "train was stopped: `sd3pipe run` goes on from there\n"
    assert process.stderr.read() == ""  # the command says that it heard, and not the one that runs it as well


@pytest.mark.long
def test_a_signal_before_a_command_is_started_reaches_it(tmp_path, monkeypatch):
    from sd3pipe import child

    program = tmp_path / "program.py"
    program.write_text(CHILD)
    monkeypatch.setattr(child, "_PROGRAM", program)
    start = subprocess.Popen

    def started(*arguments, **named):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        return start(*arguments, stdout=subprocess.DEVNULL, **named)

    monkeypatch.setattr(child.subprocess, "Popen", started)
    begun = time.monotonic()
    with stopping.listening(), pytest.raises(Stopped):
        child.run_child("train", [], same_command="sd3pipe run")
    assert time.monotonic() - begun < 20


def test_nothing_is_started_after_the_wish(monkeypatch):
    from sd3pipe import child

    monkeypatch.setattr(child, "_PROGRAM", Path("nothing"))
    with stopping.listening():
        asked(signal.SIGTERM)
        with pytest.raises(Stopped):
            child.run_child("train", [], same_command="sd3pipe run")


def test_a_failed_command_gives_its_code_and_a_killed_one_may_go_on():
    assert ChildFailed("train", 7, "sd3pipe run").exit_code == 7
    killed = ChildFailed("train", -9, "sd3pipe run")
    assert (killed.exit_code, str(killed)) == (75, "train was ended by signal 9: `sd3pipe run` goes on from there")
