"""How far a loop has come, told in lines where there is no terminal."""

import logging

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
    assert told[0] == "train: 2/20 steps, 0.5/s, 36.0 s left, loss 0.5, lr 0.0001"
    assert len(told) == 10
    assert told[-1].startswith("train: 20/20 steps, 0.5/s, 0.0 s left")


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(caplog, monkeypatch):
    told = lines(caplog, monkeypatch, done=16, total=20, seconds_per_unit=2.0)
    assert told == [
        "train: 18/20 steps, 0.5/s, 4.0 s left, loss 0.5, lr 0.0001",
        "train: 20/20 steps, 0.5/s, 0.0 s left, loss 0.5, lr 0.0001",
    ]
