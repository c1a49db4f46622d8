"""How far a loop has come: bars on a terminal, lines where there is none."""

import logging
import os
import pty
import re
import sys

import pytest

from sd3pipe import console


def lines(caplog, monkeypatch, *, done: int, total: int, seconds_per_unit: float) -> list[str]:
    clock = {"now": 0.0}
    monkeypatch.setattr(console.time, "monotonic", lambda: clock["now"])
    with caplog.at_level(logging.INFO), console.progress("train", total, "steps", done=done) as bar:
        for _ in range(total - done):
            clock["now"] += seconds_per_unit
            bar.advance(1, loss="0.5", lr="0.0001")
    return caplog.messages


def test_lines_come_at_every_tenth_with_rate_time_left_and_fields(caplog, monkeypatch):
    told = lines(caplog, monkeypatch, done=0, total=20, seconds_per_unit=2.0)
    assert told[0] == "train: 2/20 steps, 2 s/it, 36.0 s left, loss 0.5, lr 0.0001"
    assert len(told) == 10
    assert told[-1].startswith("train: 20/20 steps, 2 s/it, 0.0 s left")


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(caplog, monkeypatch):
    told = lines(caplog, monkeypatch, done=16, total=20, seconds_per_unit=2.0)
    assert told == [
        "train: 18/20 steps, 2 s/it, 4.0 s left, loss 0.5, lr 0.0001",
        "train: 20/20 steps, 2 s/it, 0.0 s left, loss 0.5, lr 0.0001",
    ]


def test_work_within_work_says_so_now_and_then_and_costs_no_rate(caplog, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(console.time, "monotonic", lambda: clock["now"])
    with caplog.at_level(logging.INFO), console.progress("train", 2, "steps") as outer:
        with console.progress("samples at step 0", 40, "steps") as inner:
            for _ in range(40):
                clock["now"] += 1.0
                inner.advance()
        clock["now"] += 2.0
        outer.advance()
    assert caplog.messages == [
        "samples at step 0: 10/40 steps, 1/s, 30.0 s left",
        "samples at step 0: 20/40 steps, 1/s, 20.0 s left",
        "samples at step 0: 30/40 steps, 1/s, 10.0 s left",
        "samples at step 0: 40/40 steps, 1/s, 0.0 s left",
        "train: 1/2 steps, 2 s/it, 2.0 s left",
    ]


ON_A_TERMINAL = """
import logging, signal, time
from sd3pipe import stopping
from sd3pipe.console import progress, setup_logging
setup_logging()
stopping.listen()
with progress("train", 2000, "steps") as bar:
    with progress("samples at step 0", 20, "steps") as inner:
        inner.advance()
        time.sleep(0.3)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
    for _ in range(2):
        time.sleep(1.1)
        bar.advance(1, loss="0.1234", lr="0.0001", memory="10.2 GB")
    logging.getLogger("sd3pipe").info("a line of its own")
"""


def on_a_terminal(columns: int) -> list[str]:
    """Returns every line that a program has shown on a terminal, without colours."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ["COLUMNS"] = str(columns)
        os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL])
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how a terminal says that its program has ended
            break
        shown += piece
    os.waitpid(process, 0)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()))


@pytest.mark.long
@pytest.mark.parametrize("columns", [80, pytest.param(160, marks=pytest.mark.slow)])
def test_a_bar_keeps_its_times_and_says_what_is_being_done(columns):
    lines = on_a_terminal(columns)
    assert "SIGTERM: stopping after what is under way; once more ends at once" in lines
    assert "a line of its own" in lines
    assert any(re.match(r"samples at step 0 .* 1/20 +steps ", line) for line in lines)
    last = [line for line in lines if line.startswith("train")][-1]
    assert re.match(r"train .* 2/2000 steps 0:00:\d\d 0:3\d:\d\d 1\.\d+ s/it  loss 0\.1234 ", last)
    assert len(last) <= columns
    assert ("memory 10.2 GB" in last) == (columns == 160)
