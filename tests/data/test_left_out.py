"""A dataset says what lies in its folders and is not used."""

import json
import os

import pytest
from PIL import Image

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics").mkdir()
    return tmp_path


def add(folder, *names):
    for name in names:
        path = folder / "pics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".gif", ".tif", ".tiff", ".jfif"):
            kind = {".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG"}.get(path.suffix.lower(), "JPEG")
            Image.new("RGB", (20, 10), (len(name), 0, 0)).save(path, kind)
        else:
            path.write_text("text")


def scanned(folder, extra="", more="", **options):
    file = folder / "d.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pics'\n{extra}\n{more}", encoding="utf-8"
    )
    return scan(load_dataset(file), FileStamps(folder / "stat.json"), **options)


def told(folder, extra="", more="", **options):
    """Returns the lines without the folder's name in front."""
    return [line.split("pics: ", 1)[1] for line in scanned(folder, extra, more, **options).left_out]


def test_gif_tiff_and_what_browsers_call_jpegs_are_read(folder):
    add(folder, "a.gif", "b.TIF", "c.tiff", "d.jfif")
    found = scanned(folder)
    assert [picture.name for picture in found.pictures] == ["a.gif", "b.TIF", "c.tiff", "d.jfif"]
    assert not found.unreadable


def test_a_tidy_folder_has_nothing_to_tell(folder):
    add(
        folder,
        "a.png",
        "a.txt",
        "b.jpg",
        "b.caption",
        "a.npz",
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "._a.png",
        "._a.txt",
    )
    assert told(folder) == []


_OWN_SUBSET = "give each a [[datasets.subsets]] of its own, with its image_dir and its number as num_repeats"
_LIKE_MASKS = (
    "trained like any other, though called as masks of others: move masks into a folder of their own, under the names "
    "of their pictures, for conditioning_data_dir"
)
_TAKES = "metadata_file = NAME takes captions from one"


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["x.psd", "y.PSD"], "not read: 2 files (x.psd, y.PSD) with .psd"),
        (["photo"], "not read: 1 file (photo) with no ending"),
        ([".b.png"], "not read: 1 file (.b.png) with a hidden name"),
        (["metadata.jsonl"], f"not read: 1 metadata file (metadata.jsonl): {_TAKES}"),
        (["meta_lat.json"], f"not read: 1 metadata file (meta_lat.json): {_TAKES}"),
        (["c/b.png", "d/c.png"], "not read: 2 pictures in 2 folders (c, d) below it: recursive = true reads them"),
        (["x/y/b.png"], "not read: 1 picture in 1 folder (x) below it: recursive = true reads them"),
        (["10_cat/b.png"], f"not read: 1 picture in 1 folder (10_cat) below it: {_OWN_SUBSET}"),
        ([".thumbs/b.png"], "not read: 1 picture in 1 folder (.thumbs) below it: hidden folders are left alone"),
        (["lone.txt"], "not read: 1 caption file (lone.txt) without a picture"),
        (["a-masklabel.png"], f"1 picture (a-masklabel.png) {_LIKE_MASKS}"),
        (["a_mask.png"], f"1 picture (a_mask.png) {_LIKE_MASKS}"),
        (["a.jpg"], "pictures that differ in the ending alone are all used, with one caption file: a.jpg and a.png"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_told(folder, names, line):
    add(folder, "a.png", "a.txt", *names)
    assert told(folder) == [line]


@pytest.mark.parametrize(
    ("name", "extra", "remedy"),
    [
        ("a.txt", "caption_extension = '.caption'", 'caption_extension = ".txt" reads them'),
        ("a.TXT", "", 'caption_extension = ".TXT" reads them'),
        ("a.tags", "", 'caption_extension = ".tags" reads them'),
        ("a.png.txt", "", 'caption_extension = ".png.txt" reads them'),
        ("A.txt", "", "the names differ in upper and lower case or in how accents are written: rename them"),
        ("a.json", "", "captions are plain text, in a .txt of the same name"),
    ],
)
def test_a_caption_under_another_name_is_told_with_what_reads_it(folder, name, extra, remedy):
    add(folder, "a.png", name)
    assert f"not read: 1 file ({name}) beside pictures without a caption: {remedy}" in told(folder, extra)
    if remedy.startswith("caption_extension"):
        setting = remedy.removesuffix(" reads them")
        assert [picture.caption for picture in scanned(folder, setting).pictures] == ["text"]
    assert not any("beside" in line for line in told(folder, extra, with_captions=False))


def test_captions_under_another_ending_than_the_others_are_to_be_renamed(folder):
    add(folder, "a.png", "a.txt", "b.png", "b.png.txt")
    assert told(folder) == [
        "not read: 1 file (b.png.txt) beside pictures without a caption: rename them to end as the other captions do"
    ]


def test_accents_that_are_written_in_another_way_are_told(folder):
    add(folder, "caf\u00e9.png", "cafe\u0301.txt")
    assert "how accents are written" in told(folder)[0]


def test_captions_of_an_ending_of_the_users_own_are_no_unread_files(folder):
    add(folder, "a.png", "a.wd14")
    assert told(folder, "caption_extension = '.wd14'") == []
    assert told(folder, "caption_extension = '.wd14'", with_captions=False) == []


def test_a_subset_without_a_picture_is_named_with_what_lies_there(folder):
    (folder / "other").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "other" / "a.png")
    other = "[[datasets.subsets]]\nimage_dir = 'other'"
    assert told(folder, "", other) == ["subset pics has no picture that is read: there is nothing in it"]
    add(folder, "a.psd", "10_cat/b.png", "a.txt")
    lies = f"1 file (a.psd) with .psd; 1 picture in 1 folder (10_cat) below it: {_OWN_SUBSET}"
    assert told(folder, "name = 'cats'", other) == [f"subset cats has no picture that is read: {lies}"]


def test_an_empty_dataset_says_what_lies_there(folder):
    add(folder, "a.mp4")
    with pytest.raises(InputError) as caught:
        scanned(folder)
    (line,) = str(caught.value).splitlines()
    assert "d.toml: the dataset is empty: " in line
    assert line.endswith("pics: subset pics has no picture that is read: 1 file (a.mp4) with .mp4")
    (folder / "m.json").write_text("{}")
    with pytest.raises(InputError, match="the dataset is empty: no metadata_file lists a picture"):
        (folder / "pics" / "a.mp4").unlink()
        scanned(folder, "metadata_file = 'm.json'")


def test_folders_and_files_of_other_subsets_are_not_told(folder):
    add(folder, "a.png", "a.txt", "masks/a.png", "5_b/b.png", "metadata.jsonl")
    (folder / "pics" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "of a"}))
    more = "\n".join(
        f"[[datasets.subsets]]\n{line}"
        for line in ("image_dir = 'pics/5_b'", "metadata_file = 'pics/metadata.jsonl'\nnum_repeats = 2")
    )
    assert told(folder, "conditioning_data_dir = 'pics/masks'", more) == []


def test_repeats_in_the_names_of_folders_do_not_count_in_silence(folder):
    add(folder, "10_cat/b.png", "2_dog/c.png")
    (line,) = told(folder, "recursive = true\nnum_repeats = 2")
    assert line.startswith("num_repeats = 2 counts in 1 folder (10_cat), whatever the name says")


def test_pictures_that_a_metadata_file_does_not_list_are_told(folder):
    add(folder, "a.png", "b.png", "c.png")
    (folder / "m.json").write_text(json.dumps({"a": {"caption": "of a"}}))
    assert told(folder, "metadata_file = 'm.json'") == ["not read: 2 pictures (b.png, c.png) that m.json does not list"]


def test_captions_that_a_metadata_file_gives_a_picture_before_its_last_are_told(folder):
    add(folder, "a.png", "b.png")
    rows = [{"file_name": name, "text": text} for name, text in (("a.png", "1"), ("b.png", "2"), ("a.png", "3"))]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = scanned(folder, "metadata_file = 'm.jsonl'")
    assert [picture.caption for picture in found.pictures] == ["3", "2"]
    assert found.left_out == [
        f"{folder}/m.jsonl: not read: all but the last caption of 1 picture (a.png), listed more than once"
    ]


def test_a_folder_that_cannot_be_opened_is_told(folder, monkeypatch):
    add(folder, "a.png", "a.txt", "closed/b.png")
    listing = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert told(folder, "recursive = true") == ["not read: 1 folder (closed/) that cannot be opened"]


def test_signs_in_names_that_would_steer_a_terminal_are_shown(folder):
    add(folder, "a.png", "a.txt", "x\x1b[31m.psd")
    assert "\x1b" not in "".join(told(folder))
