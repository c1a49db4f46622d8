"""Pictures in tars, tables and buckets: the same pictures, captions and hashes as in a folder."""

import io
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.buckets import local_s3, put
from support.containers import folder_content, write_datasets_folder, write_parquet, write_tar

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.decoding import Pixels, row_job
from sd3pipe.data.feed import decoded_rows
from sd3pipe.data.geometry import views
from sd3pipe.data.image_dirs import expanded, read_image_dir
from sd3pipe.data.scan import scan, source_files, watched_folders
from sd3pipe.errors import InputError, NetworkError, ParameterError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.watched import state_of

COUNT = 20


def png(number, size=(40, 30), **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


CONTENT = {f"{number:04d}.png": png(number) for number in range(COUNT)} | {
    f"{number:04d}.txt": f"picture {number}\r\n".encode() for number in range(COUNT) if number != 3
}


def dataset(folder, image_dir, extra=""):
    file = folder / "d.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nname = 'x'\nimage_dir = '{image_dir}'\n{extra}\n",
        encoding="utf-8",
    )
    return load_dataset(file)


def scanned(folder, image_dir, extra="", **options):
    return scan(dataset(folder, image_dir, extra), FileStamps(folder / "none.json"), **options)


def seen(found):
    return [(p.name, p.image_hash, p.width, p.height, p.has_alpha, p.occurrence, p.caption) for p in found.pictures]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    return folder


def every_form(folder, pictures):
    """Yields an image_dir for each form of the same pictures."""
    content = folder_content(pictures)
    yield write_tar(folder / "one.tar", content)
    yield write_parquet(folder / "one.parquet", content)
    yield write_datasets_folder(folder / "saved", content) / "data-00000-of-00001.arrow"


def test_every_form_gives_the_pictures_and_captions_of_the_folder(tmp_path, pictures):
    expected = seen(scanned(tmp_path, pictures))
    assert [entry[-1] for entry in expected][2:5] == ["picture 2", "", "picture 4"]
    for image_dir in every_form(tmp_path, pictures):
        assert seen(scanned(tmp_path, image_dir)) == expected, image_dir


@pytest.mark.slow  # a server of S3 answers from here
def test_every_form_in_a_bucket_does_the_same_and_is_remembered_there(tmp_path, pictures, monkeypatch):
    expected = seen(scanned(tmp_path, pictures))
    with local_s3(monkeypatch) as files:
        for place in (pictures, *every_form(tmp_path, pictures)):
            address = put(files, place, f"data/{place.name}")
            stamps = FileStamps(tmp_path / f"{place.name}.json")
            assert seen(scan(dataset(tmp_path, address), stamps)) == expected
            stamps.save()
            with monkeypatch.context() as context:
                context.setattr("sd3pipe.data.image_dirs.finding_of", None)
                context.setattr("sd3pipe.data.image_dirs._read", None)
                again = FileStamps(tmp_path / f"{place.name}.json")
                assert seen(scan(dataset(tmp_path, address), again)) == expected
        put(files, tmp_path / "one.tar", "shards/a.tar")
        put(files, tmp_path / "one.tar", "shards/b.tar")
        assert len(scanned(tmp_path, "s3://bucket/shards").pictures) == 2 * COUNT
        assert len(scanned(tmp_path, "s3://bucket/shards/{b,a}.tar").pictures) == 2 * COUNT
        with pytest.raises(InputError, match="s3://bucket/none: nothing lies below this address"):
            scanned(tmp_path, "s3://bucket/none")
    with pytest.raises(NetworkError, match="s3://bucket/data/pictures cannot be read"):
        scanned(tmp_path, "s3://bucket/data/pictures")


@pytest.mark.long
def test_workers_decode_rows_of_every_form_in_any_order(tmp_path, pictures, monkeypatch):
    def jobs(image_dir):
        found = scanned(tmp_path, image_dir).pictures
        cuts = [view for picture in found for view in views(picture, crop_variants=1, seed=0)]
        return [row_job(cuts[number].picture, cuts[number].cut, 8) for number in order]

    order = np.random.default_rng(0).permutation(COUNT)
    forms = list(every_form(tmp_path, pictures))
    with local_s3(monkeypatch) as files:
        there = [put(files, place, f"data/{place.name}") for place in (pictures, *forms)]
        asked = [job for place in (pictures, *forms, *there) for job in jobs(place)]
        rows = [row.rgb.tobytes() for row in decoded_rows(asked, workers=2) if isinstance(row, Pixels)]
    assert len({*rows[:COUNT]}) == COUNT and rows == rows[:COUNT] * (len(asked) // COUNT)


def test_folders_globs_and_braces_name_several_files(tmp_path, pictures):
    content = folder_content(pictures)
    shards = tmp_path / "shards"
    for number in range(3):
        write_tar(shards / f"s-{number:02d}.tar", {f"{number}{name}": data for name, data in content.items()})
    whole = seen(scanned(tmp_path, shards))
    assert len(whole) == 3 * COUNT and whole[0][0] == "s-00.tar/00000.png"
    for pattern in ("s-{00..02}.tar", "*.tar", "s-0[012].tar", "s-{02,00,01}.tar"):
        assert seen(scanned(tmp_path, shards / pattern)) == whole
    with pytest.raises(InputError, match=r"there is no s-03.tar \(did you mean .*s-0\d.tar"):
        scanned(tmp_path, shards / "s-{00..03}.tar")
    write_parquet(shards / "p.parquet", {f"p{name}": data for name, data in content.items()})
    (shards / "cache-1234.arrow").write_bytes(b"what the datasets library left behind")
    assert len(scanned(tmp_path, shards).pictures) == 4 * COUNT
    (shards / "deep").mkdir()
    write_tar(shards / "deep" / "x.tar", content)
    assert len(scanned(tmp_path, shards, "recursive = true").pictures) == 5 * COUNT
    (shards / "own.png").write_bytes(png(99))
    found = scanned(tmp_path, shards)
    assert [picture.name for picture in found.pictures] == ["own.png"]
    assert any("3 files (s-00.tar" in line for line in found.left_out)


def test_braces_are_those_of_a_shell():
    assert list(expanded("a-{08..11}.{x,yy}")) == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in ("x", "yy")]
    assert list(expanded("{9..10}{}{z}")) == ["9{}{z}", "10{}{z}"]


@pytest.mark.parametrize(
    "image_dir, name",
    [("cats.tar", "cats"), ("a/train-{00..12}.tar", "train"), ("shards/*.parquet", "shards"), ("s3://b/cats", "cats")],
)
def test_a_subset_is_named_after_its_file_or_what_stands_before_a_pattern(tmp_path, image_dir, name):
    dataset(tmp_path, image_dir)
    text = (tmp_path / "d.toml").read_text().replace("name = 'x'\n", "")
    (tmp_path / "d.toml").write_text(text)
    assert [subset.name for subset in load_dataset(tmp_path / "d.toml").subsets] == [name]


def test_captions_of_a_tar_are_texts_or_records_beside_the_picture(tmp_path):
    content = {name: png(number) for number, name in enumerate(("a.png", "b.png", "d/c.png", "e.png", "f.png"))}
    content |= {
        "a.json": b'{"caption": "from json"}',
        "a.txt": b"from txt",
        "b.json": b'{"caption": null, "prompt": "of b", "width": 3}',
        "d/c.caption": b"\xef\xbb\xbfof c",
        "c.txt": b"of another folder",
        "e.json": b'{"width": 3}',
        "f.tags": b"of f",
        "f.cls": b"7",
    }
    file = write_tar(tmp_path / "t.tar", content)
    found = scanned(tmp_path, file)
    assert [p.caption for p in found.pictures] == ["from txt", "of b", "of c", "", ""]
    assert any("f.cls" in line for line in found.left_out)
    assert [p.caption for p in scanned(tmp_path, file, "caption_extension = '.tags'").pictures][-1] == "of f"
    assert {p.caption for p in scanned(tmp_path, file, with_captions=False).pictures} == {""}
    assert [p.caption for p in scanned(tmp_path, file, "class_tokens = 'cat'").pictures][3] == "cat"


def test_bad_captions_of_a_tar_are_all_named(tmp_path):
    file = write_tar(tmp_path / "t.tar", {"a.png": png(0), "b.png": png(1), "a.txt": b"caf\xe9", "b.json": b"{"})
    with pytest.raises(
        InputError, match=r"(?s)t.tar: a.txt: the caption is not UTF-8.*t.tar: b.json: is not valid JSON"
    ):
        scanned(tmp_path, file)
    assert len(scanned(tmp_path, file, with_captions=False).pictures) == 2


def test_a_broken_picture_in_a_file_costs_only_itself(tmp_path):
    content = {"a.png": png(0), "b.png": b"none", "c.png": png(2)}
    for file in (
        write_tar(tmp_path / "t.tar", content),
        write_parquet(tmp_path / "t.parquet", content),
        write_datasets_folder(tmp_path / "d", content) / "data-00000-of-00001.arrow",
    ):
        found = scanned(tmp_path, file)
        assert [p.name for p in found.pictures] == ["a.png", "c.png"]
        assert [(u.name, str(u.place)) for u in found.unreadable] == [("b.png", f"{file}: b.png")]


def test_hostile_member_names_are_only_names(tmp_path):
    names = ("../../etc/a.png", "/abs/b.png", "./c.png", "x\udcff.png", "._d.png", "line\nbreak.png")
    file = write_tar(tmp_path / "t.tar", {name: png(number) for number, name in enumerate(names)})
    with tarfile.open(file, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    stamps = FileStamps(tmp_path / "stat.json")
    scan(dataset(tmp_path, file), stamps)
    stamps.save()
    found = scan(dataset(tmp_path, file), FileStamps(tmp_path / "stat.json"))
    assert [p.name for p in found.pictures] == [
        "../../etc/a.png", "/abs/b.png", "c.png", "line\nbreak.png", "x\\xff.png"
    ]  # fmt: skip
    assert any("hard.png" in line and "link.png" in line for line in found.left_out)


def test_of_members_with_one_name_the_last_counts_as_for_tar(tmp_path):
    file = write_tar(tmp_path / "t.tar", {"a.png": png(0)})
    with tarfile.open(file, "a") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(png(1, (50, 20)))
        tar.addfile(member, io.BytesIO(png(1, (50, 20))))
    assert [(p.name, p.width) for p in scanned(tmp_path, file).pictures] == [("a.png", 50)]


def damaged(file, change):
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data))
    return file


def test_a_damaged_file_is_named_with_the_place(tmp_path):
    content = {f"{number}.png": png(number) for number in range(9)}
    tar = damaged(write_tar(tmp_path / "cut.tar", content), lambda data: data[: 5 * 5120 - 700])
    with pytest.raises(InputError, match=r"^\S*cut.tar: (is no whole tar: after member \d.png|\d.png: the tar ends)"):
        scanned(tmp_path, tar)
    torn = write_tar(tmp_path / "torn.tar", content)
    with tarfile.open(torn) as opened:
        second = opened.getmembers()[1].offset
    damaged(torn, lambda data: data[:second] + b"\xff" * 512 + data[second + 512 :])
    with pytest.raises(InputError, match=r"torn.tar: is no whole tar: after member 0.png: what follows is no member"):
        scanned(tmp_path, torn)
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as opened:
        opened.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"packed.tar: is no whole tar.*unpack the compression"):
        scanned(tmp_path, packed)
    parquet = damaged(write_parquet(tmp_path / "cut.parquet", content), lambda data: data[:-100])
    with pytest.raises(InputError, match=r"cut.parquet: cannot be read as Parquet"):
        scanned(tmp_path, parquet)
    arrow = write_datasets_folder(tmp_path / "d", content) / "data-00000-of-00001.arrow"
    damaged(arrow, lambda data: data[: len(data) // 2])
    with pytest.raises(InputError, match=r"arrow: cannot be read as Arrow after row \d"):
        scanned(tmp_path, arrow)


def test_a_table_without_pictures_says_what_it_has(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"url": ["a"], "text": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: has no column of pictures: .*url \(string\), text \(string\)"):
        scanned(tmp_path, tmp_path / "t.parquet")


def test_columns_of_bytes_and_rows_without_names_do_too(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"id": [b"1", b"2", b"3"], "jpg": [png(1), png(2), None], "caption": ["one", None, "three"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    found = scanned(tmp_path, tmp_path / "t.parquet")
    assert [(p.name, p.caption) for p in found.pictures] == [("00000000", "one"), ("00000001", "")]
    assert [(u.name, u.reason) for u in found.unreadable] == [("00000002", "the row holds no bytes of a picture")]


def test_without_pyarrow_a_line_says_what_to_install(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "t.parquet", {"a.png": png(0)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r't.parquet: needs pyarrow: pip install "sd3pipe\[parquet\]"'):
        scanned(tmp_path, file)


def test_addresses_are_those_of_s3_and_have_no_metadata_file(tmp_path):
    with pytest.raises(ParameterError, match=r"image_dir = 'https://x/y': of addresses, s3://BUCKET/... is read"):
        dataset(tmp_path, "https://x/y")
    with pytest.raises(ParameterError, match="metadata_file: lists files of a folder"):
        dataset(tmp_path, "s3://x/y", "metadata_file = 'm.json'")


def test_masks_lie_in_a_folder_whatever_holds_the_pictures(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png(5))
    file = write_parquet(tmp_path / "t.parquet", {"a.png": png(0), "b.png": png(1)})
    found = scanned(tmp_path, file, f"conditioning_data_dir = '{tmp_path}/masks'")
    assert [(p.name, p.mask_hash is not None) for p in found.pictures] == [("a.png", True)]
    assert "there is no mask for it" in found.unreadable[0].reason


def test_masks_of_shards_lie_in_folders_called_as_these(tmp_path):
    for number in (0, 1):
        write_tar(tmp_path / "shards" / f"{number}.tar", {"1.png": png(number)})
    (tmp_path / "masks" / "1.tar").mkdir(parents=True)
    (tmp_path / "masks" / "1.png").write_bytes(png(5))
    with pytest.raises(InputError, match=r"would be the mask of 0\.tar/1\.png, 1\.tar/1\.png, which differ"):
        scanned(tmp_path, tmp_path / "shards", f"conditioning_data_dir = '{tmp_path}/masks'")
    (tmp_path / "masks" / "1.tar" / "1.png").write_bytes(png(6))
    found = scanned(tmp_path, tmp_path / "shards", f"conditioning_data_dir = '{tmp_path}/masks'")
    assert len({p.mask_hash for p in found.pictures}) == 2


def test_counting_reads_no_picture(tmp_path, pictures, monkeypatch):
    forms = list(every_form(tmp_path, pictures))
    monkeypatch.setattr("sd3pipe.data.tars.finding_of", None)
    monkeypatch.setattr("sd3pipe.data.tables.finding_of", None)
    for image_dir in forms:
        entries = read_image_dir(dataset(tmp_path, image_dir).subsets[0], None).entries
        assert len(entries) == COUNT and sum(entry.caption is not None for entry in entries) >= COUNT - 1


def test_captions_alone_are_read_without_a_picture_or_taken_from_what_a_scan_remembers(tmp_path, pictures, monkeypatch):
    forms = list(every_form(tmp_path, pictures))
    known = FileStamps(tmp_path / "known.json")
    expected = [picture.caption for picture in scan(dataset(tmp_path, forms[0]), known).pictures]
    monkeypatch.setattr("sd3pipe.data.tars.finding_of", None)
    monkeypatch.setattr("sd3pipe.data.tables.finding_of", None)
    for image_dir in forms:
        entries = read_image_dir(dataset(tmp_path, image_dir).subsets[0], FileStamps(tmp_path / "n.json")).entries
        assert [entry.caption or "" for entry in entries] == expected
    monkeypatch.setattr("sd3pipe.data.image_dirs._read", None)
    assert len(read_image_dir(dataset(tmp_path, forms[0]).subsets[0], known).entries) == COUNT


def test_a_second_scan_reads_nothing_and_a_changed_tar_is_read_again(tmp_path, pictures, monkeypatch):
    content = folder_content(pictures)
    file = write_tar(tmp_path / "t.tar", content)
    stamps = FileStamps(tmp_path / "stat.json")
    first = scan(dataset(tmp_path, file), stamps)
    stamps.save()
    with monkeypatch.context() as context:
        context.setattr("sd3pipe.data.image_dirs._read", None)
        assert seen(scan(dataset(tmp_path, file), FileStamps(tmp_path / "stat.json"))) == seen(first)
    write_tar(file, content | {"0000.png": png(77)})
    second = scan(dataset(tmp_path, file), FileStamps(tmp_path / "stat.json"))
    assert [p.name for p, q in zip(first.pictures, second.pictures, strict=True) if p.image_hash != q.image_hash] == [
        "0000.png"
    ]


def test_the_state_of_a_dataset_changes_with_its_tars(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("sd3pipe.watched.COARSE_CLOCK_NS", 0)  # no waiting until a stat is sure to tell
    shards = tmp_path / "shards"
    content = folder_content(pictures)
    for name in ("a.tar", "b.tar"):
        write_tar(shards / name, content)
        os.utime(shards / name, (1e9, 1e9))
    for image_dir in (shards, shards / "*.tar", shards / "b.tar"):
        described = dataset(tmp_path, image_dir)
        watched = watched_folders(described, captions=True)
        assert [entry.folder for entry in watched] == [str(shards)]
        found = source_files(scan(described, FileStamps(tmp_path / "n.json")), described, captions=True)
        files = [shards / "b.tar"] if image_dir.name == "b.tar" else [shards / "a.tar", shards / "b.tar"]
        assert found.files == dict.fromkeys(files)
        assert set(found.folders) == (set() if image_dir.name == "b.tar" else {shards})
    before = state_of(tmp_path / "d.toml", watched)
    write_tar(shards / "b.tar", {"a.png": png(3)})
    assert before is not None and before != state_of(tmp_path / "d.toml", watched)
