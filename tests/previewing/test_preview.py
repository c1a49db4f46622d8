"""The preview draws the very cuts, masks and captions of the encode stages, and warns of what may surprise."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageFilter

from sd3pipe.commands.encode_latents import main as encode_latents
from sd3pipe.commands.preview import main
from sd3pipe.errors import DeviceMemoryError, InputError, ParameterError
from sd3pipe.fingerprint import hash_file
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.preview import PreviewParams
from sd3pipe.previewing import thumbnails
from sd3pipe.previewing.cards import Card, Section, spread
from sd3pipe.previewing.sheet import draw_card, draw_sheet

DATASET = """
[[datasets]]
resolution = 128
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 192
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = "pics"
flip_aug = true
num_repeats = 3
[[datasets.subsets]]
image_dir = "masked"
alpha_mask = true
random_crop = true
shuffle_caption = true
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    rng = np.random.default_rng(0)
    sizes = {"wide.png": (200, 100), "wide 2.png": (210, 104), "small.png": (70, 72), "big.jpg": (300, 310)}
    sizes |= {"<b>name.png": (128, 128), "tall.png": (100, 200)}
    for name, size in sizes.items():
        path = folder / "pics" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    (folder / "pics" / "copy.png").write_bytes((folder / "pics" / "wide.png").read_bytes())
    (folder / "pics" / "broken.png").write_bytes(b"")
    (folder / "pics" / "wide.txt").write_text("a <script>alert(1)</script> & more", encoding="utf-8")
    (folder / "pics" / "big.txt").write_text("word " * 100, encoding="utf-8")
    (folder / "masked").mkdir()
    rgba = rng.integers(0, 256, (140, 220, 4), dtype=np.uint8)
    rgba[..., 3] = 0
    Image.fromarray(rgba).save(folder / "masked" / "wide.png")
    (folder / "masked" / "wide.txt").write_text("a, b, c, d", encoding="utf-8")
    (folder / "d.toml").write_text(DATASET)
    return folder


def preview(project, **options):
    params = {"dataset": project / "d.toml", "out": project / "out", "max_data_loader_n_workers": 0, "threads": 1}
    main(PreviewParams(**(params | options)))
    return (project / "out" / "index.html").read_text(encoding="utf-8")


def test_there_is_a_png_per_bucket_and_a_page_that_needs_nothing_else(project, capsys):
    page = preview(project)
    files = sorted(path.name for path in (project / "out").iterdir())
    buckets = re.findall(r"<h2>(\d+) x (\d+) <small>", page)
    assert files == sorted(["index.html", *(f"{width}x{height}.png" for width, height in buckets)])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg;base64,") == 8
    assert "8 pictures in" in capsys.readouterr().out
    for file in files[:-1]:
        assert Image.open(project / "out" / file).format == "PNG"


@pytest.mark.long
def test_near_duplicates_and_blur_are_told_of_the_picture_and_of_all(tmp_path, caplog):
    (tmp_path / "pics").mkdir()
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "coffee.png")
    photograph.save(tmp_path / "pics" / "coffee.png")
    photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((300, 200)).save(tmp_path / "pics" / "mirror.jpg")
    photograph.rotate(90, expand=True).filter(ImageFilter.GaussianBlur(9)).save(tmp_path / "pics" / "soft.png")
    (tmp_path / "d.toml").write_text("[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = 'pics'\n")
    page = preview(tmp_path)
    assert "nearly the same as pics/mirror.jpg, mirrored" in page and page.count("blurred everywhere") == 2
    said = caplog.text
    assert "2 pictures nearly the same as another: coffee.png = mirror.jpg mirrored" in said and "soft.png" in said


def test_captions_of_caches_stand_in_columns(project, tmp_path):
    digest = hash_file(project / "pics" / "wide.png")
    for cache, words in (("captions", "a <i>wide</i> picture"), ("tags", "wide, noise")):
        (tmp_path / cache).mkdir()
        line = {"image": digest, "subset": "pics", "caption": words}
        (tmp_path / cache / "captions.jsonl").write_text(json.dumps(line) + "\n")
    page = preview(project, captions=(tmp_path / "captions", tmp_path / "tags"))
    assert page.count("<tr><th>captions</th><th>tags</th></tr>") == 2  # of the picture, and of its copy
    assert "<td>a &lt;i&gt;wide&lt;/i&gt; picture</td><td>wide, noise</td>" in page
    with pytest.raises(InputError, match=r"nowhere: has no captions\.jsonl"):
        preview(project, captions=(tmp_path / "nowhere",))


@pytest.mark.long
def test_a_second_preview_decodes_what_is_new(project, tmp_path, monkeypatch):
    folder = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("out"))
    decoded = []
    decode = thumbnails.decoded_rows
    monkeypatch.setattr(thumbnails, "decoded_rows", lambda jobs, **rest: decode(decoded.extend(jobs) or jobs, **rest))
    first = preview(folder)
    assert decoded
    decoded.clear()
    assert preview(folder) == first and decoded == []
    kept = sorted((folder / ".sd3pipe" / "out" / "thumbnails").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert preview(folder) == first and len({job.image_hash for job in decoded}) == 1
    decoded.clear()
    Image.new("RGB", (70, 72)).save(folder / "pics" / "small.png")
    preview(folder)
    assert [job.place.file.name for job in decoded] == ["small.png"]
    now = sorted((folder / ".sd3pipe" / "out" / "thumbnails").iterdir())
    assert len(now) == len(kept) and now != kept


def test_text_from_files_cannot_become_markup(project):
    page = preview(project)
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "&lt;b&gt;name.png" in page and "<b>name.png" not in page


def test_warnings_name_what_may_surprise(project, caplog):
    page = preview(project)
    assert "enlarged by a quarter or more" in page and "small.png" in page
    assert "1 picture is there more than once: pics/copy.png = pics/wide.png" in page
    assert "buckets hold a single picture" in page
    assert "broken.png: left out: the file is empty" in page
    assert "without a caption" in page


@pytest.mark.long
def test_captions_that_are_cut_off_are_told(project, shared_dir):
    page = preview(project, tokenizers=shared_dir / "tokenizers")
    assert "1 picture with a caption that is cut off: big.jpg" in page
    assert "CLIP reads 77 of 102 tokens" in page and re.search(r"CLIP 102 of 77, T5 \d+ of 256 tokens", page)


def test_variants_crops_flips_and_repeats_are_shown(project):
    page = preview(project, caption_variants=5, crop_variants=3)
    assert re.search(r"5 variants, [2-5] of them different", page) and re.search(r"[23] random crops", page)
    assert "mirrored too" in page and "seen 3 times" in page


def test_old_sheets_are_removed_and_foreign_files_stay(project):
    preview(project)
    (project / "out" / "999x999.png").write_bytes(b"old")
    (project / "out" / "mine.png").write_bytes(b"mine")
    preview(project)
    assert not (project / "out" / "999x999.png").exists()
    (project / "out" / "mine.png").unlink()


@pytest.mark.long
def test_a_cache_is_drawn_by_decoding_it(project, base, monkeypatch):
    encode_latents(
        EncodeLatentsParams(
            model=str(base.model), dataset=project / "d.toml", out=project / "latents", threads=1, crop_variants=2,
            max_data_loader_n_workers=0,
        )
    )  # fmt: skip
    page = preview(project, latents=project / "latents", model=str(base.model), out=project / "out")
    assert "Preview of latents" in page and "mirrored" in page and "crop 1" in page
    assert page.count("data:image/jpeg") == 16  # seven pictures, each mirrored, and two crops of the masked one
    assert "broken.png: left out" in page
    assert sum(int(number) for number in re.findall(r"<small>(\d+) pictures?[;,]", page)) == 8

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("sd3pipe.previewing.cache_cards.cache_preview", no_memory)
    with pytest.raises(DeviceMemoryError, match="host ran out of memory"):
        preview(project, latents=project / "latents", model=str(base.model), out=project / "again")


def test_a_dataset_of_which_no_picture_can_be_used_is_refused(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "d.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "pics"\n')
    with pytest.raises(InputError, match="none of 1 picture can be used"):
        preview(tmp_path)


def test_without_dataset_and_cache_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ParameterError, match="--dataset or --latents"):
        main(PreviewParams(out=tmp_path / "out"))


def test_a_card_darkens_what_is_cut_off_and_stripes_what_is_masked():
    white = np.full((40, 80, 3), 250, np.uint8)
    mask = np.ones((40, 80), np.float32)
    mask[:, 40:] = 0
    drawn = np.asarray(draw_card(Card(name="a", picture=white, mask=mask, cuts=((0.0, 0.25, 1.0, 0.5),))))
    assert drawn[2, 10].max() < 100  # above the cut
    assert drawn[20, 20].min() == 250  # inside, unmasked
    assert drawn[20, 44:76].reshape(-1, 3).std() > 20  # striped


def test_a_sheet_grows_with_its_cards():
    card = Card(name="a.png", picture=np.zeros((100, 240, 3), np.uint8), captions=("a cat",), warnings=("tiny",))
    sizes = []
    for count in (1, 5, 12):
        section = Section(width=240, height=100, pictures=count, rows=count, cards=(card,) * count)
        sizes.append(Image.open(io.BytesIO(draw_sheet(section))).size)
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[1][1] < sizes[2][1]


def test_shown_pictures_are_spread_over_all():
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 4) == [0, 1, 2]
