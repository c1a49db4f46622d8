"""Remembered facts live exactly as long as a file stays what it was."""

import gc
import os
import time
from pathlib import Path

import pytest

from sd3pipe.file_stamps import FileStamps, tick_ns


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(b"pixels")
    return path


def remembered(tmp_path: Path, picture: Path) -> Path:
    stamps = FileStamps(tmp_path / "memory.json")
    stamps.remember(picture, "hash", "abc")
    stamps.save()
    return tmp_path / "memory.json"


def test_a_value_is_recalled_while_the_file_is_unchanged(tmp_path, picture):
    file = remembered(tmp_path, picture)
    assert FileStamps(file).recall(picture, "hash") == "abc"
    assert FileStamps(file).recall(picture, "size") is None


def test_same_size_and_restored_mtime_do_not_deceive(tmp_path, picture):
    file = remembered(tmp_path, picture)
    before = picture.stat()
    picture.write_bytes(b"PIXELS")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert picture.stat().st_mtime_ns == before.st_mtime_ns
    assert FileStamps(file).recall(picture, "hash") is None


def test_a_replaced_file_is_another_file(tmp_path, picture):
    file = remembered(tmp_path, picture)
    other = tmp_path / "other.png"
    other.write_bytes(b"pixels")
    other.replace(picture)
    assert FileStamps(file).recall(picture, "hash") is None


def test_distrust_recalls_nothing_but_saves(tmp_path, picture):
    file = remembered(tmp_path, picture)
    stamps = FileStamps(file, trust=False)
    assert stamps.recall(picture, "hash") is None
    stamps.remember(picture, "hash", "def")
    assert stamps.recall(picture, "hash") == "def"
    stamps.save()
    assert FileStamps(file).recall(picture, "hash") == "def"


def test_a_change_between_recall_and_remember_is_noticed(tmp_path, picture):
    file = tmp_path / "memory.json"
    stamps = FileStamps(file)
    assert stamps.recall(picture, "hash") is None
    picture.write_bytes(b"other pixels")
    stamps.remember(picture, "hash", "hash of the first content")
    stamps.save()
    assert FileStamps(file).recall(picture, "hash") is None


def test_a_run_remembers_files_that_were_written_just_before_it(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"pixels")
    stamps = FileStamps(tmp_path / "memory.json")
    assert stamps.recall(picture, "hash") is None
    stamps.remember(picture, "hash", "abc")
    stamps.save()
    assert FileStamps(tmp_path / "memory.json").recall(picture, "hash") == "abc"


def test_a_change_after_a_value_was_recalled_is_noticed(tmp_path, picture):
    """As where one file of several is known, and so all are read again."""
    file = remembered(tmp_path, picture)
    stamps = FileStamps(file)
    assert stamps.recall(picture, "hash") == "abc"
    picture.write_bytes(b"PIXELS")
    stamps.remember(picture, "width", 1024)
    stamps.save()
    assert FileStamps(file).recall(picture, "width") is None


def test_a_change_within_the_tick_of_the_clock_is_noticed(tmp_path):
    """Right after the file was read, and with the size and the mtime that it had: only the ctime can tell."""
    picture = tmp_path / "picture.png"
    for attempt in range(5):
        picture.write_bytes(b"pixels %d" % attempt)
        stamps = FileStamps(tmp_path / "memory.json")
        assert stamps.recall(picture, "hash") is None
        before = picture.stat()
        picture.write_bytes(b"PIXELS %d" % attempt)
        os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
        stamps.remember(picture, "hash", "hash of the first content")
        time.sleep(0.03)
        stamps.save()
        assert FileStamps(tmp_path / "memory.json").recall(picture, "hash") is None


def test_a_file_from_the_future_is_not_remembered(tmp_path, picture, monkeypatch):
    """Its clock is another machine's, which may show the same time again after a change."""
    real_time = time.time_ns
    monkeypatch.setattr("sd3pipe.file_stamps.time.time_ns", lambda: real_time() - 3_600_000_000_000)
    assert FileStamps(remembered(tmp_path, picture)).recall(picture, "hash") is None


def test_a_file_system_that_counts_in_seconds_is_given_more_time():
    assert tick_ns((1, 1_500_000_000, 2_000_000_001, 0, 0)) == 20_000_000
    assert tick_ns((1, 3_000_000_000, 2_000_000_000, 0, 0)) == 2_000_000_000


def test_many_young_files_are_waited_for_once(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(100)]
    stamps = FileStamps(tmp_path / "memory.json")
    for path in paths:
        path.touch()
    start = time.monotonic()
    for path in paths:
        stamps.recall(path, "hash")
    assert time.monotonic() - start < 1.0  # 100 waits of one tick each would take 2 s


def test_a_link_and_its_target_are_one_file(tmp_path, picture):
    file = remembered(tmp_path, picture)
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    assert FileStamps(file).recall(link, "hash") == "abc"


def test_values_of_two_processes_are_merged(tmp_path, picture):
    other = tmp_path / "other.png"
    other.write_bytes(b"other")
    first, second = FileStamps(tmp_path / "memory.json"), FileStamps(tmp_path / "memory.json")
    first.remember(picture, "hash", 1)
    second.remember(other, "hash", 2)
    second.remember(picture, "width", 3)
    first.save()
    second.save()
    stamps = FileStamps(tmp_path / "memory.json")
    assert [stamps.recall(picture, "hash"), stamps.recall(other, "hash"), stamps.recall(picture, "width")] == [1, 2, 3]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 99, "files": {}}', b'{"format": 1, "files": {"a": 1}}']
)
def test_a_damaged_memory_is_an_empty_one(tmp_path, picture, content):
    (tmp_path / "memory.json").write_bytes(content)
    stamps = FileStamps(tmp_path / "memory.json")
    assert stamps.recall(picture, "hash") is None
    stamps.remember(picture, "hash", "abc")
    stamps.save()
    assert FileStamps(tmp_path / "memory.json").recall(picture, "hash") == "abc"


def test_files_that_are_gone_are_forgotten(tmp_path, picture):
    file = remembered(tmp_path, picture)
    picture.unlink()
    stamps = FileStamps(file)
    other = tmp_path / "other.png"
    other.write_bytes(b"x")
    stamps.remember(other, "hash", "def")
    stamps.save()
    assert b"picture.png" not in file.read_bytes()


def test_a_memory_that_cannot_be_written_only_warns(tmp_path, picture, caplog):
    (tmp_path / "file").write_bytes(b"")
    stamps = FileStamps(tmp_path / "file" / "memory.json")
    stamps.remember(picture, "hash", "abc")
    stamps.save()
    assert "not remembered" in caplog.text


@pytest.fixture
def frozen_objects():
    """What other tests left is not searched for cycles, as what is imported is not in a command."""
    gc.collect()
    gc.freeze()  # for good: so is what was imported while tests were collected


@pytest.mark.long
@pytest.mark.usefixtures("frozen_objects")
def test_ten_thousand_recalls_take_little_more_than_looking_at_the_files(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{number:05}.jpg" for number in range(10_000)]
    stamps = FileStamps(tmp_path / "memory.json")
    for path in paths:
        path.touch()
    for path in paths:
        stamps.remember(path, "picture", {"hash": "0" * 64, "width": 1024, "height": 768})
    stamps.save()
    start = time.process_time()
    for path in paths:
        path.stat()
    looked = time.process_time()
    stamps = FileStamps(tmp_path / "memory.json")
    assert all(stamps.recall(path, "picture") for path in paths)
    assert time.process_time() - looked < 100 * (looked - start)  # 2 to 5 times, alone
