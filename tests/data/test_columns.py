"""Captions of tables and of records in tars: which one counts, and what is told where none does."""

import io

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from support.containers import write_tar

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps

RECORD = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(1), png(2)]
IMAGE = pyarrow.array([{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(PICTURES)], RECORD)


def scanned(image_dir, extra="", **options):
    file = image_dir.parent / "d.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{image_dir}'\n{extra}", encoding="utf-8"
    )
    return scan(load_dataset(file), FileStamps(image_dir.parent / "stat.json"), **options)


def captions(found):
    return [picture.caption for picture in found.pictures]


def table(folder, columns, name="t.parquet"):
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / name)
    return folder / name


@pytest.mark.parametrize(
    "text",
    [
        {"TEXT": ["a", "b"]},
        {"Caption": pyarrow.array(["a", "b"], pyarrow.string_view())},
        {"caption": pyarrow.array(["a", "b"]).dictionary_encode()},
        {"text": ["no", "b"], "caption": ["a", None]},
        {"text": ["a", "b"], "caption": pyarrow.nulls(2, pyarrow.string())},
    ],
)
def test_a_row_has_the_first_text_of_its_columns(tmp_path, text):
    found = scanned(table(tmp_path, {"image": IMAGE, **text}))
    assert captions(found) == ["a", "b"] and not found.left_out


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"description": ["a", "b"]}, "description (string)"),
        ({"caption": [["a"], ["b"]]}, "caption (list<element: string>)"),
        ({"caption": [1, 2]}, "caption (int64)"),
        ({"caption": [b"a", b"b"]}, "caption (binary)"),
    ],
)
def test_columns_that_stand_for_captions_are_told(tmp_path, column, told):
    file = table(tmp_path, {"image": IMAGE, **column})
    found = scanned(file)
    assert captions(found) == ["", ""]
    line = f"{file}: not read: {told} of 1 file (t.parquet): a caption is a text under caption, prompt or text"
    assert found.left_out == [line]
    assert scanned(file).left_out == [line]  # of what is remembered
    assert not scanned(file, with_captions=False).left_out


def test_columns_of_several_tables_are_told_in_one_line(tmp_path):
    table(tmp_path / "d", {"image": IMAGE, "label": [1, 2]}, "0.parquet")
    table(tmp_path / "d", {"image": IMAGE, "url": ["u", "v"]}, "1.parquet")
    table(tmp_path / "d", {"image": IMAGE, "url": ["u", "v"], "text": ["a", "b"]}, "2.parquet")
    (line,) = scanned(tmp_path / "d").left_out
    assert "label (int64), url (string) of 2 files (0.parquet, 1.parquet)" in line


def test_two_columns_of_one_name_are_refused(tmp_path):
    two = pyarrow.Table.from_arrays(
        [IMAGE, pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"])], ["image", "text", "text"]
    )
    parquet.write_table(two, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: has 2 columns called text: rename all but one"):
        scanned(tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", [RECORD, pyarrow.binary_view()])
def test_pictures_are_records_before_they_are_plain_bytes_and_may_be_views(tmp_path, kind):
    pictures = IMAGE if kind is RECORD else pyarrow.array(PICTURES, kind)
    columns = {"id": [b"1", b"2"], "photo": pictures} if kind is RECORD else {"image": pictures}
    assert len(scanned(table(tmp_path, columns)).pictures) == 2


def test_an_arrow_file_without_bytes_is_damaged(tmp_path):
    (tmp_path / "e.arrow").write_bytes(b"")
    with pytest.raises(InputError, match=r"e.arrow: cannot be read as Arrow after row 0"):
        scanned(tmp_path / "e.arrow")


def test_records_without_a_text_are_told(tmp_path):
    content = {"a.png": PICTURES[0], "a.json": b'{"caption": ["x"], "url": null}', "b.png": PICTURES[1]}
    found = scanned(write_tar(tmp_path / "t.tar", content | {"b.json": b'{"Caption": "b", "prompt": "no"}'}))
    assert captions(found) == ["", "b"]
    (line,) = found.left_out
    assert line.endswith(
        "not read: caption (list) of 1 file (t.tar): a caption is a text under caption, prompt or text"
    )


def test_captions_without_a_picture_in_a_tar_are_told(tmp_path):
    content = {
        "0001.input.png": PICTURES[0],
        "0001.txt": b"of the key",
        "b.png": PICTURES[1],
        "b.txt": b"b",
        "b.json": b"{}",
    }
    found = scanned(write_tar(tmp_path / "t.tar", content))
    assert captions(found) == ["", "b"]
    assert found.left_out == [f"{tmp_path}/t.tar: not read: 1 caption file (0001.txt) without a picture"]
    with pytest.raises(InputError, match=r"no picture that is read: 1 other file \(a.json\)"):
        scanned(write_tar(tmp_path / "texts.tar", {"a.json": b"{}"}))


def test_tables_in_folders_below_are_told(tmp_path):
    table(tmp_path / "data", {"image": IMAGE}, "train-00000-of-00001.parquet")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.tar").write_bytes(b"")
    with pytest.raises(
        InputError, match=r": 1 tar or table in 1 folder \(data\) below it: recursive = true reads them"
    ):
        scanned(tmp_path / "data" / "..")


def test_what_git_left_in_the_place_of_large_files_is_told(tmp_path):
    pointer, told = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        r"is a Git LFS pointer.*git lfs pull",
    )
    for name in ("t.tar", "t.parquet", "t.arrow"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(InputError, match=f"{name}: {told}"):
            scanned(tmp_path / name)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(pointer)
    (file,) = scanned(folder).unreadable
    assert file.reason.startswith("it is a Git LFS pointer")
    (folder / "a.txt").write_bytes(pointer)
    with pytest.raises(InputError, match=f"a.txt: {told}"):
        scanned(folder)


def test_a_file_that_is_no_folder_says_what_is_read(tmp_path):
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"cats.tar: there is no such file"):
        scanned(tmp_path / "cats.tar")
    with pytest.raises(InputError, match=r"pictures.zip: is no folder, and no file of pictures that is read \(.tar, "):
        scanned(tmp_path / "pictures.zip")
