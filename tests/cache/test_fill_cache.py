"""A cache folder holds what is wanted now, and is the same whatever it held before."""

import pytest
from support.comparing import folder_bytes
from support.fake_cache import FakeEncoder, captions, fake_row, fill, wanted_texts

from sd3pipe.cache.folder import CacheFolder, machine_folder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.segment_plan import SegmentPlan
from sd3pipe.cache.store import fill_cache, missing_rows
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import stamp_of


def fresh(tmp_path, wanted, name="fresh", **options):
    """Returns the files of a cache that is encoded from nothing."""
    fill(tmp_path / name / "text", wanted, **options)
    return folder_bytes(tmp_path / name / "text")


def test_rows_come_back_as_they_were_encoded(out):
    wanted = wanted_texts(captions(30))
    counts = fill(out, wanted)
    assert (counts.encoded, counts.reused, counts.published) == (30, 0, True)
    reader = CacheReader(out, verify_reads="always")
    assert len(reader) == 30 and len(reader.samples) == 30
    for key, row in zip(wanted.keys, wanted.rows, strict=True):
        expected, got = fake_row(row.source), reader.row(key)
        assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in got.items()} == {
            name: (t.dtype, t.shape, bytes(t.data)) for name, t in expected.items()
        }


def test_nothing_to_do_asks_the_encoder_for_nothing_and_touches_no_file(out):
    wanted = wanted_texts(captions(30))
    fill(out, wanted)
    before = {path: stamp_of(path.stat()) for path in out.rglob("*")}
    encoder = FakeEncoder(wanted)
    counts = fill_cache(out, wanted, encoder, made_with="fake 1")
    assert (counts.in_place, counts.encoded, encoder.asked) == (30, 0, [])
    assert {path: stamp_of(path.stat()) for path in out.rglob("*")} == before


def test_only_new_rows_are_encoded_and_the_rest_is_copied_or_left(out, tmp_path):
    fill(out, wanted_texts(captions(30)))
    wanted = wanted_texts(captions(31))
    counts = fill(out, wanted)
    assert counts.encoded == 1 and counts.reused == 30
    assert folder_bytes(out) == fresh(tmp_path, wanted)


def test_a_change_and_its_reversal_leave_the_folder_as_it_was(out):
    wanted = wanted_texts(captions(30))
    fill(out, wanted)
    before = folder_bytes(out)
    assert fill(out, wanted_texts({**captions(30), "00003.png": "changed"})).encoded == 1
    assert folder_bytes(out) != before
    counts = fill(out, wanted)
    assert counts.encoded == 0 and counts.unused > 0
    assert folder_bytes(out) == before


def test_other_weights_encode_everything_and_the_old_weights_nothing(out, tmp_path):
    fill(out, wanted_texts(captions(12)))
    assert fill(out, wanted_texts(captions(12), weights="w1")).encoded == 12
    assert folder_bytes(out) == fresh(tmp_path, wanted_texts(captions(12), weights="w1"))
    assert fill(out, wanted_texts(captions(12))).encoded == 0


def test_equal_captions_share_one_row(out):
    counts = fill(out, wanted_texts({"a.png": "same", "b.png": "same"}))
    assert counts.encoded == 1
    reader = CacheReader(out)
    assert reader.samples.numbers("row").tolist() == [0, 0]
    assert reader.samples.strings("name").to_list() == ["a.png", "b.png"]


def test_order_of_the_dataset_does_not_show(out, tmp_path):
    names = captions(30)
    fill(out, wanted_texts(names))
    assert folder_bytes(out) == fresh(tmp_path, wanted_texts(dict(reversed(names.items()))))


def test_unreadable_rows_leave_the_plan_and_are_listed(out, tmp_path):
    wanted = wanted_texts(captions(30))
    counts = fill(out, wanted, unreadable={"picture number 7": "cut short"})
    assert (counts.encoded, counts.failed, counts.quarantined, counts.published) == (29, 1, 1, True)
    reader = CacheReader(out)
    assert [(e["name"], e["reason"]) for e in reader.manifest.quarantined] == [("00007.png", "cut short")]
    assert "00007.png" not in reader.samples.strings("name").to_list()
    others = {name: text for name, text in captions(30).items() if name != "00007.png"}
    segments = {name for name in fresh(tmp_path, wanted_texts(others)) if name.startswith("segments")}
    assert {name for name in folder_bytes(out) if name.startswith("segments")} == segments


def test_unreadable_rows_are_not_tried_again_until_asked(out):
    wanted = wanted_texts(captions(30))
    fill(out, wanted, unreadable={"picture number 7": "cut short"})
    before = folder_bytes(out)
    encoder = FakeEncoder(wanted)
    counts = fill_cache(out, wanted, encoder, made_with="fake 1")
    assert encoder.asked == [] and counts.quarantined == 1
    assert folder_bytes(out) == before
    counts = fill(out, wanted, retry_unreadable=True)
    assert (counts.encoded, counts.quarantined) == (1, 0)


def test_what_a_killed_run_found_unreadable_is_tried_again_when_asked(out):
    wanted = wanted_texts(captions(30))
    fill(out, wanted, unreadable={"picture number 7": "cut short"}, shard=(0, 1000))
    fill(out, wanted, unreadable=dict.fromkeys(captions(30).values(), "cut short"), shard=(1, 1000))
    assert list(CacheFolder(out).unreadable.iterdir())
    counts = fill(out, wanted, retry_unreadable=True)
    assert counts.published and counts.quarantined == 0


def test_dry_run_names_what_is_missing_and_makes_nothing(out):
    wanted = wanted_texts(captions(5))
    assert set(missing_rows(out, wanted).keys) == set(wanted.keys)
    assert not out.exists()
    fill(out, wanted)
    more = wanted_texts(captions(6))
    assert set(missing_rows(out, more).keys) == set(more.keys) - set(wanted.keys)
    assert missing_rows(out, wanted).keys == ()


def test_shards_fill_one_plan_and_the_last_one_publishes(out, tmp_path):
    wanted = wanted_texts(captions(50))
    first = fill(out, wanted, shard=(0, 3))
    assert not first.published and first.left > 0
    with pytest.raises(InputError, match="no finished cache"):
        CacheReader(out)
    fill(out, wanted, shard=(2, 3))
    last = fill(out, wanted, shard=(1, 3))
    assert last.published and last.left == 0
    assert folder_bytes(out) == fresh(tmp_path, wanted)


def test_shards_agree_on_unreadable_rows(out, tmp_path):
    wanted = wanted_texts(captions(60))
    unreadable = {f"picture number {number}": "cut" for number in (3, 14, 15, 16, 29, 41, 42, 50)}
    for shard in ((1, 3), (0, 3), (2, 3)):
        counts = fill(out, wanted, unreadable=unreadable, shard=shard)
    assert counts.published and counts.quarantined == 8
    assert folder_bytes(out) == fresh(tmp_path, wanted, unreadable=unreadable)


def test_a_damaged_segment_is_set_aside_and_encoded_again(out):
    wanted = wanted_texts(captions(30))
    fill(out, wanted)
    before = folder_bytes(out)
    victim = sorted((out / "segments").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    counts = fill(out, wanted)
    assert 1 <= counts.encoded <= 4
    assert folder_bytes(out) == before
    assert len(list((machine_folder(out) / "damaged").iterdir())) == 1


def test_a_damaged_row_at_hand_is_not_copied(out, tmp_path):
    wanted = wanted_texts(captions(60))
    planned = {leaf.plan_id for leaf in SegmentPlan(CacheFolder(tmp_path / "none"), wanted, read_only=True).leaves}
    fill(out, wanted_texts(captions(30)))
    for path in (out / "segments").iterdir():
        if path.stem not in planned:  # the others stay, unread
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    counts = fill(out, wanted)
    assert counts.encoded > 30 and counts.copied > 0
    assert folder_bytes(out) == fresh(tmp_path, wanted)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holiday\.jpg"):
        fill(tmp_path / "pictures", wanted_texts(captions(1)))
    assert [path.name for path in tmp_path.rglob("*")] == ["pictures", "holiday.jpg"]
