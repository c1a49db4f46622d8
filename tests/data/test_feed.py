"""Decoding ahead: in order, bounded, and a worker that dies costs one picture."""

import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image
from support.deadly_job import DeadlyJob

from sd3pipe import stopping
from sd3pipe.data import feed
from sd3pipe.data.cut import Cut
from sd3pipe.data.decoding import DecodeJob, Pixels
from sd3pipe.data.feed import decoded_rows
from sd3pipe.data.places import Place
from sd3pipe.errors import UnreadablePicture
from sd3pipe.fingerprint import hash_file

CUT = Cut(resized=(16, 8), left=0, top=0, size=(16, 8), flip=False, resize_filter=None, mask=None, background=None)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    made = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (16, 8), (number, 0, 0)).save(path)
        made.append(DecodeJob(place=Place(path), image_hash=hash_file(path), mask_place=None, mask_hash=None, cut=CUT))
    path = folder / "5.png"
    path.write_bytes(path.read_bytes()[:40])
    return made


def colours(rows):
    return [row.rgb[0, 0, 0] if isinstance(row, Pixels) else str(row) for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_order_and_broken_ones_keep_their_place(jobs, workers):
    found = colours(decoded_rows(jobs, workers=workers))
    assert found[:5] + found[6:] == [n for n in range(12) if n != 5]
    assert isinstance(found[5], str)


@pytest.mark.long
def test_a_picture_that_kills_its_worker_costs_only_itself(jobs):
    deadly = [DeadlyJob(job) if number in (3, 7) else job for number, job in enumerate(jobs)]
    found = colours(decoded_rows(deadly, workers=2))
    assert [number for number, row in enumerate(found) if isinstance(row, str)] == [3, 5, 7]
    assert found[3] == found[7] == "it ended the process that decoded it"
    assert [row for row in found if not isinstance(row, str)] == [n for n in range(12) if n not in (3, 5, 7)]


@pytest.mark.parametrize("deadly", [{3, 7}, {4, 5}])
def test_a_death_that_is_noticed_when_the_next_job_is_given_costs_one_picture(jobs, monkeypatch, deadly):
    """As where the encoder is slower than the decoders: rows before the deadly one are done, and wait."""

    class Pool:
        def __init__(self, *arguments, **named):
            self.broken = False

        def submit(self, call, job, slot):
            if self.broken:
                raise BrokenProcessPool
            future = Future()
            number = int(job.place.file.stem)
            self.broken = number in deadly
            if self.broken:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(Pixels(rgb=np.full((8, 16, 3), number, np.uint8), mask=None))
            return future

        def shutdown(self, **named):
            pass

    monkeypatch.setattr(feed, "ProcessPoolExecutor", Pool)
    found = colours(decoded_rows(jobs, workers=1))
    assert found == ["it ended the process that decoded it" if n in deadly else n for n in range(12)]


@pytest.mark.long
def test_jobs_are_taken_only_as_far_ahead_as_memory_allows(jobs):
    taken = []

    def endless():
        for number in range(10_000):
            taken.append(number)
            yield jobs[number % 5]

    rows = decoded_rows(endless(), workers=1)
    assert isinstance(next(rows), Pixels)
    assert len(taken) <= 6  # four per worker, the one that is out and the one that is next
    rows.close()


def test_pixels_are_what_the_file_holds(jobs):
    (row,) = decoded_rows(jobs[:1], workers=1)
    assert row == Pixels(rgb=row.rgb, mask=None)
    assert np.array_equal(row.rgb, np.asarray(Image.open(jobs[0].place.file)))


def test_a_missing_file_is_a_broken_row(jobs, tmp_path):
    gone = DecodeJob(place=Place(tmp_path / "gone.png"), image_hash="0" * 64, mask_place=None, mask_hash=None, cut=CUT)
    (row,) = decoded_rows([gone], workers=0)
    assert isinstance(row, UnreadablePicture) and "cannot be read" in str(row)


@pytest.mark.long
def test_pixels_come_through_a_pipe_where_shared_memory_is_short(jobs, monkeypatch):
    through_memory = colours(decoded_rows(jobs, workers=2))
    monkeypatch.setattr("sd3pipe.data.feed._SHARED_FOLDER", jobs[0].place.file.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert colours(decoded_rows(jobs, workers=2)) == through_memory


@pytest.mark.long
def test_a_row_that_was_yielded_is_not_overwritten(jobs):
    good = [job for number, job in enumerate(jobs) if number != 5]
    rows = list(decoded_rows(good * 3, workers=1))
    assert colours(rows) == [n for n in range(12) if n != 5] * 3


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be held back here")
def test_a_worker_is_started_with_signals_held_back(jobs, monkeypatch):
    held = []

    class Pool:
        def __init__(self, *arguments, **named):
            pass

        def submit(self, call, job, slot):
            held.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            done = Future()
            done.set_result(Pixels(rgb=np.zeros((8, 16, 3), np.uint8), mask=None))
            return done

        def shutdown(self, **named):
            pass

    monkeypatch.setattr(feed, "ProcessPoolExecutor", Pool)
    assert len(list(decoded_rows(jobs[:2], workers=1))) == 2
    assert all(set(stopping.SIGNALS) <= mask for mask in held) and len(held) == 2
    assert not set(stopping.SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())
