"""Scans: which pictures, captions and masks belong to a dataset, and what is remembered of them."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from sd3pipe.data import findings
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan, source_files, tell_about_captions, tell_about_pictures
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics").mkdir()
    return tmp_path


def add(folder, name, colour=(9, 9, 9), caption=None, size=(20, 10)):
    path = folder / "pics" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def scanned(folder, extra="", image_dir="image_dir = 'pics'", **options):
    file = folder / "d.toml"
    file.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{image_dir}\n{extra}", encoding="utf-8")
    return scan(load_dataset(file), FileStamps(folder / "stat.json"), **options)


def names(found):
    return [picture.name for picture in found.pictures]


def test_pictures_are_found_by_their_endings_in_the_order_of_names(folder):
    for name in ("b.png", "a.JPG", "c.webp", "d.bmp"):
        add(folder, name)
    add(folder, "sub/f.png")
    add(folder, "._hidden.png")
    assert names(scanned(folder)) == ["a.JPG", "b.png", "c.webp", "d.bmp"]
    assert names(scanned(folder, "recursive = true")) == ["a.JPG", "b.png", "c.webp", "d.bmp", "sub/f.png"]


def test_captions_are_found_by_ending_then_by_face_crop_name(folder):
    add(folder, "a.png", caption="from txt")
    (folder / "pics" / "a.caption").write_text("from caption")
    add(folder, "b.png")
    (folder / "pics" / "b.caption").write_text("only caption")
    add(folder, "c_10_20_30_40.png")
    (folder / "pics" / "c.txt").write_text("of the whole")
    add(folder, "d.png")
    captions = [picture.caption for picture in scanned(folder).pictures]
    assert captions == ["from txt", "only caption", "of the whole", ""]
    assert [p.caption for p in scanned(folder, "class_tokens = 'a cat'").pictures][-1] == "a cat"
    assert [p.caption for p in scanned(folder, "caption_extension = '.caption'").pictures][:2] == [
        "from caption",
        "only caption",
    ]


@pytest.mark.parametrize("ending", [".wd.txt", "_wd.txt", "-caption.txt"])
def test_a_first_caption_is_written_where_it_is_read(folder, ending):
    picture = add(folder, "a.b.png")
    (before,) = scanned(folder, f"caption_extension = '{ending}'").pictures
    assert before.caption_file == picture.with_name(f"a.b{ending}")
    before.caption_file.write_text("a cat")
    (after,) = scanned(folder, f"caption_extension = '{ending}'").pictures
    assert after.caption == "a cat" and after.caption_file == before.caption_file


def test_byte_order_mark_and_line_ends_are_no_part_of_a_caption(folder):
    add(folder, "a.png", caption=b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert scanned(folder).pictures[0].caption == "one\ntwo"


def test_captions_that_are_not_utf8_are_all_named(folder):
    add(folder, "a.png", caption=b"caf\xe9")
    add(folder, "b.png", caption=b"\xff")
    with pytest.raises(InputError) as caught:
        scanned(folder)
    told = str(caught.value)
    assert "a.txt: the caption is not UTF-8 text (byte 3)" in told and "b.txt" in told
    assert len(scanned(folder, with_captions=False).pictures) == 2


def test_who_only_shows_a_dataset_is_told_of_problems_and_has_the_other_pictures(folder):
    add(folder, "a.png", caption=b"caf\xe9")
    add(folder, "b.png", caption="cat")
    found = scanned(folder, "[[datasets.subsets]]\nimage_dir = 'gone'", past_problems=True)
    assert names(found) == ["b.png"] and [file.name for file in found.unreadable] == ["a.png"]
    first, second = found.problems
    assert "a.txt: the caption is not UTF-8" in first and "gone: there is no such folder" in second
    (folder / "pics" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError):
        scanned(folder, past_problems=True)


def test_zero_bytes_are_no_text(folder):
    add(folder, "a.png", caption="a cat".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"a.txt: the caption is not UTF-8 text \(there are zero bytes in it\)"):
        scanned(folder)


def test_words_for_no_caption_are_told(folder, caplog):
    for number, caption in enumerate(("nan", "None", "a nan", "null ")):
        add(folder, f"{number}.png", caption=caption)
    with caplog.at_level("WARNING", "sd3pipe"):
        tell_about_captions(scanned(folder))
    assert "3 pictures whose caption is a word that programs write where there is none" in caplog.text


@pytest.mark.parametrize(
    "image_dir, told",
    [
        ("image_dir = 'none'", "none: there is no such folder$"),
        ("image_dir = 'PICS'", r"PICS: there is no such folder \(did you mean .*pics\?\)$"),
        ('image_dir = "C:\\new"', r"C:\\new: there is no such folder \(a backslash begins an escape"),
        ("image_dir = 'd.toml'", "d.toml: is no folder, and no file of pictures that is read"),
    ],
)
def test_a_missing_folder_is_named(folder, image_dir, told):
    with pytest.raises(InputError, match=told):
        scanned(folder, image_dir=image_dir)


def test_an_empty_dataset_is_an_error(folder):
    with pytest.raises(InputError, match="the dataset is empty"):
        scanned(folder)


def test_equal_pictures_are_counted_in_order_of_names(folder):
    for name in ("a.png", "b.png", "c.png"):
        add(folder, name)
    assert [(p.name, p.occurrence) for p in scanned(folder).pictures] == [("a.png", 0), ("b.png", 1), ("c.png", 2)]


METADATA = {"a": {"caption": "of a", "tags": "x, y"}, "sub/b.png": {"tags": ["t1", "t2"]}, "gone.png": {"caption": "?"}}


def test_metadata_files_name_pictures_and_captions(folder):
    add(folder, "a.png")
    add(folder, "sub/b.png")
    (folder / "meta.json").write_text(json.dumps(METADATA))
    found = scanned(folder, "metadata_file = 'meta.json'")
    assert [(p.name, p.caption) for p in found.pictures] == [("a", "of a,x, y"), ("sub/b.png", "t1,t2")]
    assert [(u.name, u.reason) for u in found.unreadable] == [
        ("gone.png", "there is no such file (listed in meta.json)")
    ]


@pytest.mark.parametrize(
    "name, text",
    [
        ("m.jsonl", '{"file_name": "a.png", "text": "of a"}\n\n{"image_path": "pics/b.png", "caption": "of b"}\n'),
        ("m.csv", 'file_name,text\na.png,of a\npics/b.png,"of b"\n'),
    ],
)
def test_record_files_follow_the_conventions_of_datasets(folder, name, text):
    add(folder, "a.png")
    add(folder, "b.png")
    (folder / name).write_text(text)
    found = scanned(folder, f"metadata_file = '{name}'")
    assert [(p.name, p.caption) for p in found.pictures] == [("a.png", "of a"), ("pics/b.png", "of b")]


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("m.json", "[]", "must be a table"),
        ("m.json", "{", "not valid JSON"),
        ("m.json", '{"a.1": "a cat"}', r"m\.json: 'a\.1': must be a table, as {\"caption\": \"a cat\"} is"),
        ("m.jsonl", '{"text": "no name"}', "line 1"),
        ("m.jsonl", '"a.png"', r"line 1: must name a picture \(image_path or file_name\)"),
        ("m.jsonl", '{"file_name": "a.png"}', "neither caption nor tags"),
        (
            "m.jsonl",
            '{"file_name": "a.png", "text": ["a"]}',
            r"neither caption nor tags that are text \(it has file_name, text",
        ),
        ("m.csv", "file_name,text\na.png,a cat, on a mat\n", "line 2: has more values than the first line has names"),
        ("m.txt", "", "ends in .json"),
    ],
)
def test_damaged_metadata_says_where(folder, name, text, told):
    add(folder, "a.png")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=told):
        scanned(folder, f"metadata_file = '{name}'")


def test_masks_are_found_by_name_and_must_fit(folder):
    for name, size in (("a.png", (20, 10)), ("b.jpg", (20, 10)), ("c.png", (20, 10))):
        add(folder, name, size=size)
    (folder / "masks").mkdir()
    Image.new("L", (20, 10)).save(folder / "masks" / "a.jpg")
    Image.new("L", (20, 11)).save(folder / "masks" / "b.png")
    found = scanned(folder, "conditioning_data_dir = 'masks'")
    assert names(found) == ["a.png"] and found.pictures[0].mask_hash == hash_file(folder / "masks" / "a.jpg")
    reasons = {item.name: item.reason for item in found.unreadable}
    assert "its mask has 20 x 11 pixels, but it has 20 x 10" in reasons["b.jpg"]
    assert "no mask" in reasons["c.png"]


def test_two_masks_of_one_picture_are_refused(folder):
    add(folder, "a.png")
    (folder / "masks").mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("L", (20, 10)).save(folder / "masks" / name)
    with pytest.raises(InputError, match=r"masks: a\.jpg and a\.png are masks of one picture: keep one$"):
        scanned(folder, "conditioning_data_dir = 'masks'")


def masks(folder, *names, size=(20, 10)):
    for number, name in enumerate(names):
        path = folder / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, number).save(path)


def paired(found, folder):
    return {p.name: p.mask_place.file.relative_to(folder / "masks").as_posix() for p in found.pictures}


def test_masks_lie_in_folders_as_pictures_do_else_under_the_name_alone(folder):
    for number, name in enumerate(("1.png", "a/1.png", "b/1.png", "b/c/2.png")):
        add(folder, name, (number, 0, 0))
    masks(folder, "1.png", "a/1.jpg", "b/1.png", "2.png")
    found = scanned(folder, "recursive = true\nconditioning_data_dir = 'masks'")
    assert paired(found, folder) == {"1.png": "1.png", "a/1.png": "a/1.jpg", "b/1.png": "b/1.png", "b/c/2.png": "2.png"}


def test_one_mask_of_pictures_that_differ_is_refused(folder):
    for number, name in enumerate(("a/1.png", "b/1.png", "a/2.png", "b/2.png")):
        add(folder, name, (number, 0, 0))
    add(folder, "c/1.png", (0, 0, 0))  # equal to a/1.png
    masks(folder, "1.png", "2.png")
    extra = "recursive = true\nconditioning_data_dir = 'masks'"
    with pytest.raises(
        InputError,
        match=r"masks/1\.png: would be the mask of a/1\.png, b/1\.png, which differ \(as do those of 1 further",
    ) as caught:
        scanned(folder, extra)
    assert "\n" not in str(caught.value)
    for name in ("b/1.png", "b/2.png"):
        (folder / "pics" / name).unlink()
    assert paired(scanned(folder, extra), folder) == {"a/1.png": "1.png", "a/2.png": "2.png", "c/1.png": "1.png"}


def test_a_listed_picture_has_the_mask_of_its_file(folder):
    for number, name in enumerate(("img.1.png", "img.2.png", "x/img.2.png")):
        add(folder, name, (number, 0, 0))
    masks(folder, "img.png", "img.1.png", "img.2.png", "x/img.2.png")
    listed = {name: {"caption": "a"} for name in ("img.1", "img.2", str(folder / "pics" / "x" / "img.2"))}
    (folder / "meta.json").write_text(json.dumps(listed))
    found = scanned(folder, "metadata_file = 'meta.json'\nconditioning_data_dir = 'masks'")
    assert sorted(paired(found, folder).values()) == ["img.1.png", "img.2.png", "x/img.2.png"]


def test_of_many_pictures_that_are_left_out_the_first_are_named(folder, caplog):
    add(folder, "whole.png")
    for number in range(25):
        (folder / "pics" / f"{number:02d}.png").write_bytes(b"")
    with caplog.at_level("WARNING", "sd3pipe"):
        tell_about_pictures(scanned(folder))
    assert len(caplog.messages) == 21
    assert caplog.messages[-1] == "and 5 more pictures left out"


def test_the_validation_split_depends_on_content_alone(folder):
    for number in range(200):
        add(folder, f"{number:03d}.png", (number, 0, 0), size=(4, 4))
    extra = "validation_split = 0.2\nvalidation_seed = 5"
    before = {p.image_hash: p.split for p in scanned(folder, extra).pictures}
    assert 20 <= list(before.values()).count("validation") <= 60  # 40 expected; 3.5 standard deviations either way
    add(folder, "copy of one.png", (7, 0, 0), size=(4, 4))
    add(folder, "000 new.png", (0, 200, 0), size=(4, 4))
    after = scanned(folder, extra).pictures
    assert all(picture.split == before.get(picture.image_hash, picture.split) for picture in after)
    assert {p.split for p in scanned(folder, extra + "\nis_reg = true").pictures} == {"train"}
    other = {p.image_hash: p.split for p in scanned(folder, "validation_split = 0.2\nvalidation_seed = 6").pictures}
    assert other != {**other, **before}


def test_links_and_loops_are_no_trap(folder):
    add(folder, "a.png")
    pics = folder / "pics"
    (pics / "again.png").symlink_to("a.png")
    (pics / "loop.png").symlink_to("loop.png")
    (pics / "nowhere.png").symlink_to("missing.png")
    (pics / "round").symlink_to(pics, target_is_directory=True)
    (pics / "folder.png").mkdir()
    found = scanned(folder, "recursive = true")
    assert names(found) == ["a.png", "again.png"]
    assert {item.name for item in found.unreadable} == {"loop.png", "nowhere.png"}


@pytest.mark.long
def test_the_second_scan_needs_no_pillow_and_sees_edits(folder):
    add(folder, "a.png", caption="one")
    add(folder, "b.png")
    file = folder / "d.toml"
    scanned(folder)
    script = f"""
import sys
from pathlib import Path
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan
from sd3pipe.file_stamps import FileStamps
stamps = FileStamps(Path({str(folder / "stat.json")!r}))
found = scan(load_dataset(Path({str(file)!r})), stamps)
stamps.save()
print(found.pictures[0].caption, found.pictures[1].width, 'PIL' in sys.modules, 'torch' in sys.modules)
"""

    def run():
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()

    time.sleep(0.05)  # a file that is younger than the clock's tick is not trusted
    assert run() == ["one", "20", "True", "False"]
    assert run() == ["one", "20", "False", "False"]
    (folder / "pics" / "a.txt").write_text("two")
    add(folder, "b.png", size=(40, 10))
    assert run() == ["two", "40", "True", "False"]


def test_source_files_hold_what_a_cache_depends_on(folder):
    picture = add(folder, "a.png", caption="x")
    file = folder / "d.toml"
    found = scanned(folder)
    dataset = load_dataset(file)
    with_captions = source_files(found, dataset, captions=True)
    assert with_captions.files == {path: hash_file(path) for path in (picture, picture.with_suffix(".txt"))}
    assert ".txt" in with_captions.folders[folder / "pics"]
    assert set(source_files(found, dataset, captions=False).files) == {picture}


def test_a_new_plugin_has_another_look_at_what_could_not_be_read(folder, monkeypatch):
    add(folder, "a.png").write_bytes(b"none")
    versions = {"pillow": "1"}
    looked = []
    look = findings.look_into
    monkeypatch.setattr(findings, "_version", versions.get)
    monkeypatch.setattr(findings, "look_into", lambda place: looked.append(place.file.name) or look(place))
    stamps = FileStamps(folder / "stat.json")
    (folder / "d.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pics'\n")

    def scan_again():
        findings.decoder.cache_clear()
        return scan(load_dataset(folder / "d.toml"), stamps)

    assert scan_again().unreadable and scan_again().unreadable and looked == ["a.png"]
    versions["pillow-heif"] = "2"
    assert scan_again().unreadable and looked == ["a.png"] * 2
    findings.decoder.cache_clear()
