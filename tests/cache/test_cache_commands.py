"""`sd3pipe cache ...` on small caches."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.comparing import folder_bytes
from support.fake_cache import captions, fake_row, fill, wanted_texts

from sd3pipe import cli
from sd3pipe.cache import plain_zarr
from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.staleness import remember_sources, sources_seen
from sd3pipe.cache.store import missing_rows
from sd3pipe.fingerprint import hash_file


@pytest.fixture
def out(tmp_path):
    fill(tmp_path / "caches" / "text", wanted_texts(captions(30), subsets={"photos": {"num_repeats": 2}}))
    return tmp_path / "caches" / "text"


@pytest.fixture
def sd3pipe(monkeypatch, tmp_path, capsys):
    """Runs a command line and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_lists_every_cache_of_a_folder(out, sd3pipe):
    code, printed, _ = sd3pipe("cache", "ls", out.parent)
    assert code == 0 and "text, 30 rows for 30 samples" in printed and "clip_l" in printed
    code, printed, _ = sd3pipe("cache", "ls", out, "--json")
    described = json.loads(printed)[0]
    assert described["rows"] == 30 and described["subsets"]["photos"] == {"num_repeats": 2, "samples": 30}
    assert described["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def test_ls_of_no_cache_is_an_input_error(tmp_path, sd3pipe):
    code, _, message = sd3pipe("cache", "ls", tmp_path)
    assert code == 3 and "no finished cache" in message


WITHOUT_CACHE = [("ls",), ("verify",), ("why", "a.png"), ("gc",), ("export", "--out=new"), ("merge", "--out=new")]


@pytest.mark.parametrize("place", ["nowhere", "empty", "foreign", "file"])
@pytest.mark.parametrize("command", WITHOUT_CACHE, ids=lambda command: command[0])
def test_a_place_without_cache_is_an_input_error(tmp_path, sd3pipe, command, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    code, printed, message = sd3pipe("cache", command[0], tmp_path / place, *command[1:])
    assert code == 3 and place in message and not printed
    assert not (tmp_path / "new").exists()


def test_verify_of_a_whole_cache_finds_nothing(out, sd3pipe):
    code, printed, _ = sd3pipe("cache", "verify", out)
    assert code == 0 and "30 rows" in printed


def test_verify_and_repair_lead_back_to_the_same_folder(out, sd3pipe):
    before = folder_bytes(out)
    flip_last_bit(sorted((out / "segments").iterdir())[0])
    code, printed, message = sd3pipe("cache", "verify", out)
    assert code == 3 and "does not have its digest" in printed and "--repair" in message
    code, _, message = sd3pipe("cache", "verify", out, "--repair")
    assert code == 3 and "1 file moved aside" in message
    counts = fill(out, wanted_texts(captions(30), subsets={"photos": {"num_repeats": 2}}))
    assert 1 <= counts.encoded <= 4 and folder_bytes(out) == before
    assert sd3pipe("cache", "verify", out)[0] == 0


@pytest.mark.parametrize("victim", ["manifest.json", "index/*.zarr/row_offset/c.0", "index/*.zarr/row_key/zarr.json"])
def test_repair_of_manifest_and_index_loses_no_row(out, sd3pipe, victim):
    before = folder_bytes(out)
    path = next(out.glob(victim))
    path.write_bytes(path.read_bytes()[:-5])
    assert sd3pipe("cache", "verify", out, "--repair")[0] == 3
    counts = fill(out, wanted_texts(captions(30), subsets={"photos": {"num_repeats": 2}}))
    assert counts.encoded == 0 and folder_bytes(out) == before


def test_verify_names_a_missing_segment_and_a_stray_file(out, sd3pipe):
    victim = sorted((out / "segments").iterdir())[0]
    victim.unlink()
    (out / "segments" / "notes.txt").write_text("mine")
    code, printed, message = sd3pipe("cache", "verify", out)
    assert code == 3 and f"{victim} is missing" in printed and "notes.txt is no part of the cache" in printed
    assert "the next encode mends it" in message and "--repair" not in message


def test_verify_finds_a_row_whose_key_is_a_lie(out, sd3pipe):
    path = next(path for path in sorted((out / "segments").iterdir()))
    data = path.read_bytes()
    assert b'\\"scale\\":1.0' in data
    path.write_bytes(data.replace(b'\\"scale\\":1.0', b'\\"scale\\":2.0'))
    code, printed, _ = sd3pipe("cache", "verify", out)
    assert code == 3 and "its header was changed" in printed


def test_why_names_a_hit(out, sd3pipe):
    code, printed, _ = sd3pipe("cache", "why", out, "00003.png")
    assert code == 0 and "photos/00003.png: hit" in printed
    assert sd3pipe("cache", "why", out, "picture number 3")[1] == printed


def test_why_names_the_field_in_which_the_nearest_row_differs(out, sd3pipe):
    missing_rows(out, wanted_texts(captions(30), weights="w1"))
    _, printed, _ = sd3pipe("cache", "why", out, "00003.png", "--json")
    (explanation,) = json.loads(printed)
    assert explanation["state"] == "miss"
    assert [(d["field"], d["wanted"], d["nearest"]) for d in explanation["differences"]] == [
        ("fingerprints.clip_l", "w1", "w0")
    ]
    assert explanation["nearest"] == wanted_texts(captions(30)).keys[3]


def test_why_compares_a_changed_caption_with_its_own_old_row(out, sd3pipe):
    missing_rows(out, wanted_texts({**captions(30), "00003.png": "another text"}))
    _, printed, _ = sd3pipe("cache", "why", out, "another text", "--json")
    (explanation,) = json.loads(printed)
    assert [d["field"] for d in explanation["differences"]] == ["source"]
    assert explanation["nearest"] == wanted_texts(captions(30)).keys[3]


def test_why_tells_unused_and_unreadable_rows(out, sd3pipe):
    changed = wanted_texts({**captions(30), "00003.png": "another text"}, subsets={"photos": {}})
    fill(out, changed, unreadable={"another text": "cannot be said"})
    assert "00003.png: unreadable: cannot be said" in sd3pipe("cache", "why", out, "00003.png")[1]
    missing_rows(out, wanted_texts(captions(30)))
    assert "unused row" in sd3pipe("cache", "why", out, "00003.png")[1]


@pytest.fixture
def photos(out, tmp_path):
    """The pictures and captions that the cache remembers to be made from."""
    folder, wanted = tmp_path / "photos", wanted_texts(captions(30)).samples
    folder.mkdir()
    (tmp_path / "dataset.toml").write_text("")
    files = {}
    for name, image_hash in zip(wanted["name"], wanted["image_hash"], strict=True):
        picture, caption = folder / name, (folder / name).with_suffix(".txt")
        picture.write_text("picture")
        caption.write_text("caption")
        files |= {picture: image_hash, caption: hash_file(caption)}
    remember_sources(
        out, sources_seen(dataset_file=tmp_path / "dataset.toml", files=files, folders={folder: (".png", ".txt")},
        scan_started=time.time() + 60))  # fmt: skip
    return folder


def test_why_calls_a_row_stale_where_train_does(out, photos, sd3pipe):
    assert "00003.png: hit" in sd3pipe("cache", "why", out, "00003.png")[1]
    (photos / "00003.txt").write_text("another caption")
    printed = sd3pipe("cache", "why", out, "00003.png")[1]
    assert "00003.png: stale, row" in printed and "00003.txt was changed" in printed
    assert "00004.png: hit" in sd3pipe("cache", "why", out, "00004.png")[1]


def test_why_forgets_a_dry_run_over_files_that_are_back_as_they_were(out, photos, sd3pipe):
    (photos / "00003.txt").write_text("another text")
    missing_rows(out, wanted_texts({**captions(30), "00003.png": "another text"}))  # as a dry run would
    assert "00003.png: miss" in sd3pipe("cache", "why", out, "00003.png")[1]
    (photos / "00003.txt").write_text("caption")
    assert "00003.png: hit" in sd3pipe("cache", "why", out, "00003.png")[1]


def test_why_of_an_unknown_picture_is_an_input_error(out, sd3pipe):
    code, _, message = sd3pipe("cache", "why", out, "nobody.png")
    assert code == 3 and "nobody.png" in message and "--dry-run" in message


def test_gc_empties_all_or_the_old_or_the_oldest(out, sd3pipe):
    fill(out, wanted_texts(captions(10)))
    unused = CacheFolder(out).unused
    (today,) = unused.iterdir()
    old = unused / "2020-01-01"
    old.mkdir()
    moved = sorted(today.iterdir())[:2]
    for path in moved:
        path.rename(old / path.name)
    total = len(CacheFolder(out).unused_segments())
    assert "would delete" in sd3pipe("cache", "gc", out, "--dry-run")[1]
    assert len(CacheFolder(out).unused_segments()) == total
    assert "deleted 2 unused files" in sd3pipe("cache", "gc", out, "--older-than", "30")[1]
    keep = sum(path.stat().st_size for path in CacheFolder(out).unused_segments()) - 1
    assert "deleted 1 unused file" in sd3pipe("cache", "gc", out, "--keep-gb", keep / 1e9)[1]
    before = folder_bytes(out)
    assert sd3pipe("cache", "gc", out)[0] == 0
    assert CacheFolder(out).unused_segments() == [] and folder_bytes(out) == before


def test_merge_unites_two_machines(tmp_path, sd3pipe):
    subsets = {"photos": {"num_repeats": 1}}
    for machine, start in (("a", 0), ("b", 20)):
        fill(tmp_path / machine / "text", wanted_texts(captions(25, start), subsets=subsets))
    code, printed, _ = sd3pipe("cache", "merge", "a/text", "b/text", "--out", "all/text")
    assert code == 0 and "45 rows of 2 caches" in printed
    fill(tmp_path / "fresh" / "text", wanted_texts(captions(45), subsets=subsets))
    assert folder_bytes(tmp_path / "all" / "text") == folder_bytes(tmp_path / "fresh" / "text")
    assert sd3pipe("cache", "merge", "a/text", "b/text", "--out", "all/text")[0] == 0  # the same command again
    assert folder_bytes(tmp_path / "all" / "text") == folder_bytes(tmp_path / "fresh" / "text")
    code, _, message = sd3pipe("cache", "merge", "a/text", "--out", "all/text")
    assert code == 3 and "is a cache already, of other rows" in message


def test_merge_keeps_the_tags_that_its_caches_count_alike(tmp_path, sd3pipe):
    """Of captions that two caches count apart nobody knows which are the same; the next encode counts them."""
    subsets = {name: {"num_repeats": 1} for name in ("photos", "drawings")}
    for machine, photos in (("a", {"cat": 3}), ("b", {"cat": 2})):
        tags = {"photos": photos, "drawings": {"dog": 1}}
        fill(tmp_path / machine / "text", replace(wanted_texts(captions(3), subsets=subsets), tags=tags))
        assert CacheReader(tmp_path / machine / "text").manifest.tags == tags
    assert sd3pipe("cache", "merge", "a/text", "b/text", "--out", "all/text")[0] == 0
    assert CacheReader(tmp_path / "all" / "text").manifest.tags == {"drawings": {"dog": 1}}


def test_merge_counts_the_tags_of_a_subsets_halves_together(tmp_path, sd3pipe):
    halves = {"a": (captions(3), {"cat": 3, "day": 1}), "b": (captions(2, 3), {"cat": 2, "night": 1})}
    for machine, (its, tags) in halves.items():
        wanted = wanted_texts(its, subsets={"photos": {"num_repeats": 1}})
        fill(tmp_path / machine / "text", replace(wanted, tags={"photos": tags}))
    assert sd3pipe("cache", "merge", "a/text", "b/text", "--out", "all/text")[0] == 0
    whole = {"photos": {"cat": 5, "day": 1, "night": 1}}
    assert CacheReader(tmp_path / "all" / "text").manifest.tags == whole
    fill(tmp_path / "fresh" / "text", replace(wanted_texts(captions(5), subsets=wanted.subsets), tags=whole))
    assert folder_bytes(tmp_path / "all" / "text") == folder_bytes(tmp_path / "fresh" / "text")


def test_merge_refuses_other_weights_and_contradictions(tmp_path, sd3pipe):
    fill(tmp_path / "a" / "text", wanted_texts(captions(3)))
    fill(tmp_path / "b" / "text", wanted_texts(captions(3, 5), weights="w1"))
    fill(tmp_path / "c" / "text", wanted_texts({"00001.png": "something else"}))
    code, _, message = sd3pipe("cache", "merge", "a/text", "b/text", "--out", "all/text")
    assert code == 3 and "fingerprints.clip_l (w0 and w1)" in message
    code, _, message = sd3pipe("cache", "merge", "a/text", "c/text", "--out", "all/text")
    assert code == 3 and "different rows for 00001.png" in message
    code, _, message = sd3pipe("cache", "merge", "a/text", "--out", "b/text")
    assert code == 3 and "is a cache already" in message


def test_merge_names_damage_instead_of_encoding(tmp_path, sd3pipe):
    fill(tmp_path / "a" / "text", wanted_texts(captions(5)))
    for path in (tmp_path / "a" / "text" / "segments").iterdir():
        flip_last_bit(path)
    code, _, message = sd3pipe("cache", "merge", "a/text", "--out", "all/text")
    assert code == 3 and "verify --repair" in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG])
def test_export_to_where_nothing_can_be_written_says_so(out, sd3pipe, monkeypatch, number):
    """As on a disk that is mounted read-only: making a folder there fails, whoever asks."""
    make = os.mkdir

    def fails_there(path, *more, **options):
        if "elsewhere" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return make(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", fails_there)
    code, _, said = sd3pipe("cache", "export", out, "--out", "elsewhere/text.zarr")
    assert code == 7
    assert "elsewhere/text.zarr" in said


def test_export_to_a_disk_that_turns_read_only_says_so(out, sd3pipe, monkeypatch):
    def fails(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(plain_zarr, "_fill", fails)
    code, _, said = sd3pipe("cache", "export", out, "--out", "text.zarr")
    assert code == 7 and "text.zarr: cannot be written" in said
    assert not list(Path().glob("*text.zarr*"))


@pytest.mark.long
def test_export_writes_arrays_that_zarr_reads(out, sd3pipe):
    code, printed, _ = sd3pipe("cache", "export", out, "--out", "text.zarr")
    assert code == 0 and "30 rows" in printed
    group = zarr.open_group("text.zarr", mode="r")
    names = list(group["samples/name"][:])
    for name, layout, position in zip(names, group["samples/layout"][:], group["samples/position"][:], strict=True):
        source = wanted_texts(captions(30)).rows[int(name[:5])].source
        for tensor, expected in fake_row(source).items():
            assert np.array_equal(group[f"rows/{layout}/{tensor}"][position], expected.numpy(), equal_nan=True)
    assert sd3pipe("cache", "export", out, "--out", "text.zarr")[0] == 3


def test_a_copied_cache_reads_like_the_original(out, tmp_path):
    shutil.copytree(out, tmp_path / "elsewhere" / "text")
    here, there = CacheReader(out), CacheReader(tmp_path / "elsewhere" / "text", verify_reads="always")
    shutil.rmtree(out.parent)
    assert (here.keys == there.keys).all() and there.manifest == here.manifest
    assert all(there.row(number) for number in range(len(there)))
    text = b"".join(folder_bytes(tmp_path / "elsewhere" / "text").values())
    assert str(tmp_path).encode() not in text and os.uname().nodename.encode() not in text
    assert time.strftime("%Y-%m-%d").encode() not in text
