"""Rows of sd-scripts are taken over only where they are proved to belong, and never pass for rows of our own."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sd_scripts_npz import write_latents_npz, write_text_npz

from sd3pipe.cache.reader import CacheReader
from sd3pipe.commands import encode_latents, encode_text
from sd3pipe.demo.base_files import MODEL, T5_LENGTH, TOKENIZERS
from sd3pipe.demo.project import picture_files
from sd3pipe.encoding.import_latents import import_latents
from sd3pipe.encoding.import_report import ImportReport
from sd3pipe.encoding.import_text import import_text
from sd3pipe.errors import InputError
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams

PICTURES = tuple(f"pictures/wubble-{number:02d}" for number in range(4))
DATASET = """
[general]
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
resolution = [96, 64]
min_bucket_reso = 64
max_bucket_reso = 96
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = "pictures"
"""


def latents_params(folder: Path, **options) -> EncodeLatentsParams:
    values = {"device": "cpu", "threads": 1, "max_data_loader_n_workers": 0, "out": folder / "latents", **options}
    return EncodeLatentsParams(model=str(MODEL), dataset=folder / "dataset.toml", **values)


def text_params(folder: Path, **options) -> EncodeTextParams:
    values = {"device": "cpu", "threads": 1, "out": folder / "text", "t5xxl_max_token_length": T5_LENGTH, **options}
    return EncodeTextParams(model=str(MODEL), tokenizers=TOKENIZERS, dataset=folder / "dataset.toml", **values)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder with four pictures, as sd-scripts leaves it when it has cached them."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "pictures").mkdir()
    for name, content in picture_files().items():
        if name.rpartition(".")[0] in PICTURES:
            (folder / name).write_bytes(content)
    (folder / "dataset.toml").write_text(DATASET)
    encode_latents.main(latents_params(folder))
    encode_text.main(text_params(folder, text_dtype="float32"))
    write_latents_npz(folder / "latents", folder / "pictures")
    write_text_npz(folder / "text", folder / "pictures")
    for name in ("latents", "text"):
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture
def folder(cached, tmp_path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(cached, copy)  # keeps the files' times
    return copy


def latents(folder: Path, verify_rows: int = 1) -> ImportReport:
    return import_latents(latents_params(folder), folder / "imported" / "latents", verify_rows=verify_rows)


def text(folder: Path, verify_rows: int = 1) -> ImportReport:
    params = text_params(folder)
    return import_text(params, folder / "dataset.toml", folder / "imported" / "text", verify_rows=verify_rows)


def npz(folder: Path, ending: str, number: int = 0) -> Path:
    return next((folder / "pictures").glob(f"wubble-{number:02d}*{ending}.npz"))


def change(file: Path, **arrays: np.ndarray) -> None:
    with np.load(file) as old:
        np.savez(file, **{**dict(old), **arrays})  # pyright: ignore[reportArgumentType]


def reasons(report: ImportReport) -> dict[str, str]:
    return dict(report.refused)


def test_rows_that_belong_are_taken_and_nothing_is_encoded_twice(folder):
    assert (latents(folder).imported, text(folder).imported) == (4, 4)
    imported = folder / "imported"
    encode_latents.main(latents_params(folder, imported=imported))
    encode_text.main(text_params(folder, imported=imported))
    stored = CacheReader(folder / "latents")
    assert stored.manifest.recipe["imported_from"] == "sd-scripts"
    with np.load(npz(folder, "_sd3")) as arrays:
        expected = arrays[next(name for name in arrays.files if name.startswith("latents_"))]
    row = stored.row(int(stored.samples.numbers("row")[0]))
    assert np.array_equal(row["sample"].numpy(), expected.astype(np.float16))
    assert len(CacheReader(folder / "text")) == 5  # the empty caption is encoded here


def test_imported_rows_have_other_keys_than_our_own(folder):
    latents(folder)
    encode_latents.main(latents_params(folder, imported=folder / "imported"))
    theirs = CacheReader(folder / "latents").keys
    encode_latents.main(latents_params(folder, out=folder / "own"))
    assert not {key.tobytes() for key in theirs} & {key.tobytes() for key in CacheReader(folder / "own").keys}


def test_a_picture_edited_after_the_import_is_encoded_here(folder):
    latents(folder)
    picture = folder / "pictures" / "wubble-00.png"
    with Image.open(picture) as image:
        image.rotate(180).save(picture)
    encode_latents.main(latents_params(folder, imported=folder / "imported"))
    reader = CacheReader(folder / "latents")
    rows = [set(reader.row(number)) for number in range(4)]
    assert sorted(map(sorted, rows)) == [["moments"], ["sample"], ["sample"], ["sample"]]


def test_a_lost_imported_row_is_never_replaced_by_an_encoded_one(folder):
    latents(folder)
    (segment,) = [path for path in (folder / "imported").rglob("*.safetensors") if path.stat().st_size][:1]
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(InputError, match="rows that sd-scripts encoded are damaged"):
        encode_latents.main(latents_params(folder, imported=folder / "imported"))


def test_a_picture_newer_than_its_latents_is_refused(folder):
    os.utime(folder / "pictures" / "wubble-00.png")
    report = latents(folder)
    assert report.imported == 3
    assert reasons(report) == {"wubble-00.png": "png file is newer than the .npz"}


def test_a_picture_replaced_under_an_old_date_is_caught_by_encoding_again(folder):
    picture = folder / "pictures" / "wubble-00.png"
    before = picture.stat()
    with Image.open(picture) as image:
        image.rotate(180).save(picture)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = latents(folder, verify_rows=4)
    assert (report.imported, report.verified) == (3, 4)
    assert "are not those of the picture" in reasons(report)["wubble-00.png"]


def test_one_wrong_row_among_those_drawn_discredits_the_others(folder):
    for number in range(4):
        file = npz(folder, "_sd3", number)
        with np.load(file) as arrays:
            name = next(name for name in arrays.files if name.startswith("latents_"))
            changed = arrays[name][:, ::-1]
        change(file, **{name: changed})
    report = latents(folder, verify_rows=1)
    assert report.imported == 0 and len(report.refused) == 4
    assert not (folder / "imported" / "latents").exists()


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"latents_8x8": np.zeros((16, 8, 8), np.int32)}, "wanted are numbers"),
        ({"latents_8x8": np.zeros((16, 8, 9), np.float32)}, "larger than it should be|wanted are numbers"),
        ({"latents_8x8": np.full((16, 8, 8), np.nan, np.float32)}, "not finite"),
        ({"original_size_8x8": np.array([64, 64])}, "another size"),
        ({"latents_8x8": np.array([{"run": "me"}], dtype=object)}, "cannot be read|larger"),
    ],
)
def test_latents_of_a_wrong_kind_are_refused(folder, arrays, reason):
    change(npz(folder, "_sd3"), **arrays)
    report = latents(folder)
    assert report.imported == 3
    assert any(part in reasons(report)["wubble-00.png"] for part in reason.split("|"))


def test_a_torn_file_is_refused(folder):
    file = npz(folder, "_sd3")
    file.write_bytes(file.read_bytes()[:-200])
    assert "cannot be read" in reasons(latents(folder))["wubble-00.png"]


def test_mirrored_rows_come_from_their_own_latents(folder):
    (folder / "dataset.toml").write_text(DATASET.replace("enable_bucket", "flip_aug = true\nenable_bucket"))
    report = latents(folder)
    assert report.imported == 4
    missing = {f"it has no latents_flipped_{size}" for size in ("8x8", "8x12", "12x8")}
    assert {reason for _, reason in report.refused} == missing


def test_random_crops_are_refused(folder):
    (folder / "dataset.toml").write_text(DATASET.replace("enable_bucket", "random_crop = true\nenable_bucket"))
    assert {reason for _, reason in latents(folder).refused} == {"random crops: the .npz does not say where it was cut"}


def test_a_picture_that_is_turned_here_is_refused(folder):
    picture, file = folder / "pictures" / "wubble-00.png", npz(folder, "_sd3")
    with Image.open(picture) as image:
        exif = image.getexif()
        exif[0x0112] = 3
        image.save(picture, exif=exif)
    os.utime(file)
    assert "EXIF" in reasons(latents(folder))["wubble-00.png"]


def test_a_changed_caption_is_refused_whatever_its_date_says(folder):
    caption = folder / "pictures" / "wubble-00.txt"
    before = caption.stat()
    caption.write_text(" ".join(reversed(caption.read_text().split())))  # as many tokens
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = text(folder)
    assert report.imported == 3
    (reason,) = reasons(report).values()
    assert "clip_l is not that of the caption" in reason


def test_a_newer_caption_is_refused(folder):
    os.utime(folder / "pictures" / "wubble-00.txt")
    assert list(reasons(text(folder)).values()) == ["txt file is newer than the .npz"]


def test_captions_that_are_changed_before_encoding_are_refused(folder):
    (folder / "dataset.toml").write_text(DATASET.replace("enable_bucket", 'caption_prefix = "a"\nenable_bucket'))
    report = text(folder)
    assert report.imported == 0
    assert {reason for _, reason in report.refused} == {
        "the caption is changed here before it is encoded, and was not there"
    }


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"apply_t5_attn_mask": np.array(True)}, "another apply_t5_attn_mask"),
        ({"t5_out": np.zeros((T5_LENGTH + 1, 128), np.float32)}, "t5_out is"),
        ({"t5_attn_mask": np.ones(T5_LENGTH, np.int64)}, "t5_attn_mask is not that"),
    ],
)
def test_text_of_other_settings_is_refused(folder, arrays, reason):
    change(npz(folder, "_sd3_te"), **arrays)
    report = text(folder)
    assert report.imported == 3
    assert reason in next(iter(reasons(report).values()))


def test_states_of_another_t5_are_caught_by_encoding_again(folder):
    for number in range(4):
        file = npz(folder, "_sd3_te", number)
        with np.load(file) as arrays:
            changed = -arrays["t5_out"]
        change(file, t5_out=changed)
    report = text(folder, verify_rows=4)
    assert report.imported == 0
    assert all("t5xxl is not that of the caption" in reason for _, reason in report.refused)
