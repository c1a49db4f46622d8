"""Full disks, read-only folders, torn and foreign files: a clear error, and nothing lost."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.comparing import folder_bytes
from support.fake_cache import FakeEncoder, captions, fill, wanted_texts

from sd3pipe.cache import segment, store
from sd3pipe.cache.folder import CacheFolder, machine_folder
from sd3pipe.cache.merge import merge_caches
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.store import fill_cache
from sd3pipe.cache.verify import verify_cache
from sd3pipe.errors import InputError, StorageError


def full_disk_after(monkeypatch, writes):
    """Makes the operating system's write fail with ENOSPC from the n-th write of a segment on."""
    original, left = os.write, iter(range(writes))

    def write(handle, data):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(handle, data)

    monkeypatch.setattr(segment.os, "write", write)


def test_a_full_disk_keeps_what_was_complete(out, monkeypatch):
    wanted = wanted_texts(captions(40))
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="disk is full: free space"):
        full_disk_after(patch, 50)
        fill(out, wanted)
    whole = CacheFolder(out).segment_ids()
    assert whole and not (out / "manifest.json").exists()
    assert list(CacheFolder(out).writers.iterdir()) == []
    encoder = FakeEncoder(wanted)
    counts = fill_cache(out, wanted, encoder, made_with="fake 1")
    assert counts.in_place == sum(len(segment.read_header(path).rows) for path in whole.values())
    assert len(encoder.asked) == 40 - counts.in_place


def test_a_full_disk_leaves_the_published_cache_whole(out, monkeypatch):
    fill(out, wanted_texts(captions(20)))
    before = folder_bytes(out)
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        full_disk_after(patch, 0)
        fill(out, wanted_texts(captions(30)))
    assert folder_bytes(out) == before


def test_a_disk_too_small_is_found_before_encoding(out, monkeypatch):
    wanted = wanted_texts(captions(10))
    encoder = FakeEncoder(wanted)
    monkeypatch.setattr(store, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"B to be written, 1 KB free"):
        fill_cache(out, wanted, encoder, made_with="fake 1")
    assert encoder.asked == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 400 KB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk_loses_nothing(small_disk, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda path: 1 << 50)  # the check beforehand would find it
    out = small_disk / "caches" / "text"
    fill(out, wanted_texts(captions(10)))
    before = folder_bytes(out)
    with pytest.raises(StorageError, match="disk is full"):
        fill(out, wanted_texts(captions(400)))
    reader = CacheReader(out, verify_reads="always")
    assert all(reader.row(number) for number in range(len(reader)))
    kept = {name: data for name, data in folder_bytes(out).items() if name in before}
    assert kept == before
    counts = fill(out, wanted_texts(captions(10)))
    assert counts.encoded == 0 and folder_bytes(out) == before


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StorageError, match=r"cannot be written .*choose a writable folder"):
        fill(tmp_path / "text", wanted_texts(captions(3)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    (tmp_path / "caches").mkdir(mode=0o555)
    with pytest.raises(StorageError, match="cannot be written"):
        fill(tmp_path / "caches" / "text", wanted_texts(captions(3)))


def test_a_segment_that_may_not_be_read_is_no_damaged_one(out, monkeypatch):
    fill(out, wanted_texts(captions(3)))
    before = folder_bytes(out)
    open_file = os.open

    def refuse(path, *arguments, **named):
        if Path(path).parent == out / "segments":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    reader = CacheReader(out)
    with pytest.raises(PermissionError):
        reader.row(0)
    with pytest.raises(PermissionError):
        verify_cache(out, threads=1)
    assert folder_bytes(out) == before


@pytest.mark.parametrize("damage", ["cut", "empty", "other file"])
def test_a_torn_or_foreign_segment_is_an_error_for_readers_and_healed_by_encoding(out, damage):
    wanted = wanted_texts(captions(20))
    fill(out, wanted)
    before = folder_bytes(out)
    paths = sorted((out / "segments").iterdir())
    for path in paths:
        data = bytearray(path.read_bytes())
        if damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "empty":
            data = bytearray()
        else:
            data = bytearray(b"PK\x03\x04" * 100)
        path.write_bytes(data)
    reader = CacheReader(out)
    with pytest.raises(InputError, match="verify --repair"):
        reader.row(0)
    fill(out, wanted)
    assert folder_bytes(out) == before


def test_a_flipped_bit_is_found_on_the_first_read(out):
    fill(out, wanted_texts(captions(3)))
    (path,) = (out / "segments").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    key = max(wanted_texts(captions(3)).keys)
    assert CacheReader(out, verify_reads="never").row(key)
    for policy in ("first", "always"):
        with pytest.raises(InputError, match="is damaged"):
            CacheReader(out, verify_reads=policy).row(key)


def test_later_reads_are_checked_only_when_asked(out):
    fill(out, wanted_texts(captions(3)))
    key = max(wanted_texts(captions(3)).keys)
    readers = {policy: CacheReader(out, verify_reads=policy) for policy in ("first", "always")}
    for reader in readers.values():
        reader.row(key)
    (path,) = (out / "segments").iterdir()
    with open(path, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    readers["first"].row(key)
    with pytest.raises(InputError, match="is damaged"):
        readers["always"].row(key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no manifest"),
        (b"[]", "damaged or no manifest"),
        (b'{"format": 1}', "damaged or no manifest"),
        (b'{"format": 2}', "format 2"),
    ],
)
def test_a_manifest_that_cannot_be_understood_stops_everybody(out, content, message):
    wanted = wanted_texts(captions(3))
    fill(out, wanted)
    (out / "manifest.json").write_bytes(content)
    for act in (lambda: CacheReader(out), lambda: fill(out, wanted), lambda: merge_caches([out], out)):
        with pytest.raises(InputError, match=message):
            act()


def test_a_cache_of_another_kind_is_not_overwritten(out):
    fill(out, wanted_texts(captions(3)))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "kind": "latents"}))
    with pytest.raises(InputError, match="is a cache of latents, not of text"):
        fill(out, wanted_texts(captions(3)))


def test_files_in_the_segments_folder_that_are_no_segments_are_moved_aside(out):
    wanted = wanted_texts(captions(3))
    fill(out, wanted)
    before = folder_bytes(out)
    (out / "segments" / "notes.txt").write_text("mine")
    fill(out, wanted)
    assert folder_bytes(out) == before
    assert [path.read_text() for path in machine_folder(out).glob("damaged/*/notes.txt.*")] == ["mine"]


def test_published_files_are_never_written_again(out, tmp_path):
    """A DVC cache may hold the same file by hard link: what it holds must not change."""
    fill(out, wanted_texts(captions(30)))
    store_of_links = tmp_path / "links"
    shutil.copytree(out, store_of_links, copy_function=os.link)
    before = folder_bytes(store_of_links)
    fill(out, wanted_texts(captions(45, start=10)))
    fill(out, wanted_texts(captions(45, start=10), weights="w1"))
    assert folder_bytes(store_of_links) == before


def test_a_reader_of_the_old_plan_finds_its_rows_among_the_unused_ones(out):
    fill(out, wanted_texts(captions(30)))
    reader = CacheReader(out)
    fill(out, wanted_texts(captions(30), weights="w1"))
    assert all(reader.row(number) for number in range(len(reader)))


def test_a_cache_behind_a_symbolic_link_works(tmp_path):
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "caches").symlink_to("big_disk")
    fill(tmp_path / "caches" / "text", wanted_texts(captions(3)))
    assert len(CacheReader(tmp_path / "big_disk" / "text")) == 3
