"""Pictures of Parquet files are read ahead: each row group once for as many as memory holds."""

import numpy as np
import pytest
from support.containers import write_parquet

from sd3pipe.data import read_ahead as module
from sd3pipe.data.places import ParquetCell, Place, read_picture
from sd3pipe.data.read_ahead import read_ahead

parquet = pytest.importorskip("pyarrow.parquet", reason='needs pyarrow: pip install "sd3pipe[parquet]"')
COUNT, IN_A_GROUP, BYTES = 60, 10, 3000


@pytest.fixture
def pictures():
    draw = np.random.default_rng(0)
    return {f"{number:03d}.png": draw.bytes(BYTES) for number in range(COUNT)}


@pytest.fixture
def places(tmp_path, pictures):
    """The pictures' places in a file, shuffled, and the bytes that lie there."""
    file = write_parquet(tmp_path / "one.parquet", pictures, rows_in_a_group=IN_A_GROUP)
    cells = [ParquetCell(number // IN_A_GROUP, number % IN_A_GROUP, "image.bytes") for number in range(COUNT)]
    found = [Place(file, str(number), cell) for number, cell in enumerate(cells)]
    order = np.random.default_rng(1).permutation(COUNT)
    return [found[number] for number in order], [list(pictures.values())[number] for number in order]


@pytest.fixture
def groups(monkeypatch):
    """The row groups in the order in which they are unpacked."""
    seen = []
    original = parquet.ParquetFile.iter_batches

    def counted(self, *words, row_groups, **named):
        seen.extend(row_groups)
        return original(self, *words, row_groups=row_groups, **named)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    return seen


def test_each_group_is_unpacked_once_in_the_file_s_order(places, groups):
    asked, expected = places
    assert list(read_ahead(asked)) == expected
    assert groups == list(range(COUNT // IN_A_GROUP))


@pytest.mark.parametrize("share", [2, 5])
def test_what_memory_does_not_hold_takes_more_passes(places, groups, monkeypatch, share):
    asked, expected = places
    monkeypatch.setattr(module, "AHEAD_BYTES", COUNT * (BYTES + 100) // share)
    assert list(read_ahead(asked)) == expected
    assert len(groups) <= (share + 1) * COUNT // IN_A_GROUP < COUNT


def test_others_are_left_to_be_read_at_their_place_and_wait_for_nothing(places, groups, tmp_path):
    asked, expected = places
    other = Place(tmp_path / "a.png")
    ahead = read_ahead([other, *asked[:2], other, asked[2], other])
    assert next(ahead) is None and groups == []
    assert list(ahead) == [*expected[:2], None, expected[2], None]
    assert list(read_ahead([other, other])) == [None, None]
    assert list(read_ahead([])) == []


def test_a_picture_alone_is_read_at_its_place(places, groups):
    asked, expected = places
    assert list(read_ahead(asked[:1])) == [None] and groups == []
    assert read_picture(asked[0]) == expected[0]


def test_a_picture_that_comes_twice_is_there_twice(places):
    asked, expected = places
    assert list(read_ahead([asked[0], asked[1], asked[0]])) == [expected[0], expected[1], expected[0]]


def test_what_cannot_be_read_is_left_to_who_says_why(places, tmp_path):
    asked, expected = places
    gone = [Place(tmp_path / "gone.parquet", "0", ParquetCell(0, row, "image.bytes")) for row in range(2)]
    missing = Place(asked[0].file, "x", ParquetCell(99, 0, "image.bytes"))
    no_row = Place(asked[0].file, "x", ParquetCell(0, 99, "image.bytes"))
    assert list(read_ahead([*asked[:2], *gone, no_row, missing])) == [*expected[:2], None, None, None, None]


def test_too_large_a_picture_is_not_held(places, monkeypatch):
    asked, _ = places
    monkeypatch.setattr(module, "MAX_FILE_BYTES", BYTES - 1)
    assert list(read_ahead(asked)) == [None] * COUNT
