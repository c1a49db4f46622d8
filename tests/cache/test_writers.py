"""Writers fill one plan without a lock; a second plan is refused while one lives; killed ones cost little."""

import os
import random
import shutil
import threading
import time

import pytest
from support import forked
from support.comparing import folder_bytes
from support.fake_cache import FakeEncoder, captions, fill, wanted_texts

from sd3pipe.cache import writers
from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.store import fill_cache
from sd3pipe.errors import StaleError

UNREADABLE = {"picture number 7": "cut short", "picture number 30": "cut short"}
COUNT = 60


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The files of a cache that one process filled without being disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "text"
    fill(out, wanted_texts(captions(COUNT)), unreadable=UNREADABLE)
    return folder_bytes(out)


class SlowEncoder(FakeEncoder):
    """Takes some milliseconds for each row."""

    def __init__(self, wanted, unreadable, seconds):
        super().__init__(wanted, unreadable)
        self.seconds = seconds

    def __call__(self, keys):
        for item in super().__call__(keys):
            time.sleep(self.seconds)
            yield item


def fill_slowly(out, wanted, seconds=0.004, **options):
    return fill_cache(out, wanted, SlowEncoder(wanted, UNREADABLE, seconds), made_with="fake 1", **options)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_processes_side_by_side_give_the_same_folder(out, uninterrupted, number):
    wanted = wanted_texts(captions(COUNT))
    processes = [
        forked.start(lambda part=part: fill_slowly(out, wanted, 0.001, shard=(part, number))) for part in range(number)
    ]
    assert [forked.exit_code(process) for process in processes] == [0] * number
    assert folder_bytes(out) == uninterrupted


def test_processes_that_do_the_same_work_do_not_disturb_each_other(out, uninterrupted):
    wanted = wanted_texts(captions(COUNT))
    processes = [forked.start(lambda: fill_slowly(out, wanted, 0.001)) for _ in range(3)]
    assert [forked.exit_code(process) for process in processes] == [0] * 3
    assert folder_bytes(out) == uninterrupted


def test_writers_from_an_older_cache_agree(out, uninterrupted):
    fill(out, wanted_texts(captions(40)), unreadable=UNREADABLE)
    wanted = wanted_texts(captions(COUNT))
    processes = [forked.start(lambda part=part: fill_slowly(out, wanted, 0.001, shard=(part, 3))) for part in range(3)]
    assert [forked.exit_code(process) for process in processes] == [0] * 3
    assert folder_bytes(out) == uninterrupted


def wait_for_writer(out):
    while not list(CacheFolder(out).writers.glob("*/writer.json")):
        time.sleep(0.005)


@pytest.mark.long
def test_another_plan_is_refused_while_a_writer_lives(out, uninterrupted):
    process = forked.start(lambda: fill_slowly(out, wanted_texts(captions(COUNT)), 0.02))
    wait_for_writer(out)
    with pytest.raises(StaleError, match="being filled from another dataset or recipe by process"):
        fill(out, wanted_texts(captions(3)))
    assert forked.exit_code(process) == 0
    assert folder_bytes(out) == uninterrupted
    assert fill(out, wanted_texts(captions(3))).published


def test_a_dead_writer_stops_nobody_and_leaves_nothing(out):
    process = forked.start(lambda: fill_slowly(out, wanted_texts(captions(COUNT)), 1.0))
    wait_for_writer(out)
    assert forked.kill_after(process, 0.0)
    assert fill(out, wanted_texts(captions(3))).published
    assert list(CacheFolder(out).writers.iterdir()) == []


def killed_again_and_again(out, kills, seed):
    """Kills `kills` encodes at random times, alternating between two datasets."""
    chance, died = random.Random(seed), 0
    while died < kills:
        wanted = wanted_texts(captions(COUNT) if died % 3 else captions(COUNT - 20))
        process = forked.start(lambda wanted=wanted: fill_slowly(out, wanted, chance.uniform(0.0, 0.008)))
        if forked.kill_after(process, chance.uniform(0.0, 0.4)):
            died += 1
        elif chance.random() < 0.5:  # it was done before: most of the next ones have something to do again
            shutil.rmtree(out)
            shutil.rmtree(out.parent / ".sd3pipe")
        if (out / "manifest.json").exists():
            reader = CacheReader(out, verify_reads="always")
            assert all(reader.row(number) for number in range(len(reader)))
        if chance.random() < 0.1:  # an encode that finishes now and then gives the next ones something to keep
            fill(out, wanted_texts(captions(COUNT - 20)), unreadable=UNREADABLE)


@pytest.mark.long
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_times_change_nothing(out, uninterrupted, kills):
    killed_again_and_again(out, kills, seed=kills)
    fill(out, wanted_texts(captions(COUNT)), unreadable=UNREADABLE)
    assert folder_bytes(out) == uninterrupted
    assert list(CacheFolder(out).writers.iterdir()) == []


def test_a_kill_loses_at_most_the_segment_being_written(out):
    wanted = wanted_texts(captions(COUNT))
    process = forked.start(lambda: fill_slowly(out, wanted, 0.004))
    assert forked.kill_after(process, 0.2)
    whole = sum(1 for _ in (out / "segments").glob("*.safetensors"))
    encoder = FakeEncoder(wanted, UNREADABLE)
    counts = fill_cache(out, wanted, encoder, made_with="fake 1")
    assert counts.in_place + len(encoder.asked) + counts.copied + (counts.failed - len(UNREADABLE)) >= COUNT - 2
    assert counts.in_place >= whole  # every segment that got its name before the kill was used


@pytest.fixture
def far_writer(out, monkeypatch):
    """The folder of a writer on another machine, which fills the cache from another dataset."""
    monkeypatch.setattr(writers, "BEAT_SECONDS", 0.05)
    fill(out, wanted_texts(captions(2)))
    scratch = CacheFolder(out).writers / f"17-4711-{'0' * 16}-{'1' * 16}"
    scratch.mkdir()
    (scratch / "writer.json").write_text('{"host": "far", "identity": "other", "pid": 17}')
    (scratch / "beat").touch()
    return scratch


def show_life(scratch, ahead):
    """Sets the heartbeat as a machine does whose clock is `ahead` seconds before ours."""
    os.utime(scratch / "beat", (time.time() + ahead,) * 2)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_dead_writer_whose_clock_differed_stops_nobody(out, far_writer, ahead):
    show_life(far_writer, ahead)
    assert fill(out, wanted_texts(captions(3))).published
    assert not far_writer.exists()


@pytest.mark.parametrize("ahead", [3600.0, 0.0, -3600.0])
def test_a_living_writer_is_respected_whatever_its_clock_says(out, far_writer, ahead):
    show_life(far_writer, ahead)
    over = threading.Event()

    def beat():
        while not over.wait(0.02):
            show_life(far_writer, ahead)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StaleError, match="by process 17 on far"):
            fill(out, wanted_texts(captions(3)))
    finally:
        over.set()
        thread.join()
    assert far_writer.exists()
