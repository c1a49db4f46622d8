"""Near-duplicates are found and others are not; blur is told; nothing is looked at twice."""

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from skimage.measure import blur_effect

from sd3pipe.data import looks as looks_module
from sd3pipe.data.dataset_file import folder_dataset
from sd3pipe.data.looks import Looks, blur_of, edges_left, find_nearest, look_of, look_warnings
from sd3pipe.data.scan import scan
from sd3pipe.demo.drawings import all_subjects, draw
from sd3pipe.demo.project import HELD_OUT, LEARNT
from sd3pipe.file_stamps import FileStamps

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip


def photograph(name: str) -> Image.Image:
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    image.thumbnail((512, 512))
    return image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def trimmed(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    edges = (share / 2 * width, share / 2 * height, (1 - share / 2) * width, (1 - share / 2) * height)
    return image.crop(tuple(map(round, edges)))


def stamped(image: Image.Image) -> Image.Image:
    image = image.copy()
    place = (image.width * 0.6, image.height * 0.9)
    ImageDraw.Draw(image).text(place, "(c) somebody 2020", fill="white", font_size=image.height // 18)
    return image


CHANGES = {
    "compressed": lambda image: as_jpeg(image, 40),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double": lambda image: image.resize((image.width * 2, image.height * 2)),
    "trimmed": lambda image: trimmed(image, 0.02),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "stamped": stamped,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored and compressed": lambda image: as_jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 40),
}


def table_of(images) -> dict[str, np.ndarray]:
    """Returns a table of pictures that were compared with each other."""
    rows = [look_of(np.asarray(image)) for image in images]
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    table |= {"hash": np.arange(len(rows))[:, None], "nearest": np.full(len(rows), -1, np.int32)}
    table |= {"distance": np.full(len(rows), 257, np.int16), "flipped": np.zeros(len(rows), bool)}
    find_nearest(table, np.arange(len(rows)))
    return table


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [photograph(name) for name in PHOTOGRAPHS]


def test_the_hash_is_that_of_imagehash_and_the_mirrored_one_that_of_the_mirror_image(photographs):
    imagehash = pytest.importorskip("imagehash")
    for image in photographs:
        found = look_of(np.asarray(image))
        for bits, theirs in (("bits", image), ("mirrored", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
            expected = imagehash.phash(theirs, hash_size=16).hash.reshape(-1)
            assert np.array_equal(np.unpackbits(found[bits].view(np.uint8)), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(photographs, change):
    copies = [CHANGES[change](image) for image in photographs]
    table = table_of([*photographs, *copies])
    number = len(photographs)
    found = table["nearest"][number:] == np.arange(number)
    assert found.mean() > 0.9, [name for name, there in zip(PHOTOGRAPHS, found, strict=True) if not there]
    assert table["flipped"][number:][found].all() == ("mirrored" in change)


def test_other_pictures_are_not_alike(photographs):
    def quarter(image: Image.Image, x: int, y: int) -> Image.Image:
        width, height = image.width // 2, image.height // 2
        return image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))

    quarters = [quarter(image, x, y) for image in photographs for x in (0, 1) for y in (0, 1)]
    assert (table_of([*photographs, *quarters])["nearest"] < 0).all()


def test_drawings_that_differ_in_colour_alone_are_not_alike():
    generator = np.random.default_rng(3)
    drawings = [draw(subject, height=192, width=192, generator=generator) for subject in LEARNT + HELD_OUT]
    assert (table_of(drawings)["nearest"] < 0).all()


def test_the_nearest_are_those_of_all_pairs_whatever_was_compared_before():
    generator = np.random.default_rng(1)
    images = [Image.effect_noise((64, 64), 80).convert("RGB") for _ in range(300)]
    bases = [look_of(np.asarray(image)) for image in images[:4]]
    table = {name: np.stack([bases[n % 4][name] for n in range(300)]) for name in bases[0]}
    for row in range(300):  # copies with some bits turned, some mirrored
        turned = np.packbits(generator.random(256) < generator.uniform(0, 0.4)).view(np.uint64)
        one, other = ("mirrored", "bits") if generator.random() < 0.3 else ("bits", "mirrored")
        table["bits"][row], table["mirrored"][row] = table[one][row] ^ turned, table[other][row] ^ turned
    table["colours"] = (table["colours"] + generator.integers(-30, 30, (300, 1, 1, 1))).clip(0, 255).astype(np.uint8)
    fresh = {"nearest": np.full(300, -1, np.int32), "distance": np.full(300, 257, np.int16)}
    table |= {"hash": np.arange(300)[:, None], **fresh, "flipped": np.zeros(300, bool)}
    for part in np.split(np.arange(300), [100, 250]):
        find_nearest(table, part)
    colours = table["colours"].astype(np.int16)
    for row in range(300):
        best = 257
        for mirrored in (False, True):
            bits = np.bitwise_count(table["bits"][row] ^ table["mirrored" if mirrored else "bits"]).sum(axis=1)
            theirs = colours[:, :, ::-1] if mirrored else colours
            near = (bits <= 72) & (np.abs(theirs - colours[row]).mean(axis=3).max(axis=(1, 2)) <= 32)
            near[row] = False
            best = min([best, *bits[near]])
        assert table["distance"][row] == best and (table["nearest"][row] >= 0) == (best <= 72)


@pytest.mark.long
def test_blur_is_that_of_scikit_image(photographs):
    for image in photographs:
        for radius in (0, 2):
            grey = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)).convert("L"), np.float32)
            for levels, expected in zip((grey.T, grey), blur_effect(grey / 255, reduce_func=None), strict=True):
                edges, left = edges_left(levels)
                # scikit-image leaves out less at the borders
                assert left / edges == pytest.approx(expected, abs=0.02)


@pytest.mark.long
def test_blurred_pictures_are_told_from_sharp_ones_and_from_sharp_subjects(photographs):
    def blurred(images) -> float:
        return float(np.mean([blur_of(np.asarray(image)) > 0.6 for image in images]))

    def before_a_blurred_ground(image: Image.Image) -> Image.Image:
        ground, edges = image.filter(ImageFilter.GaussianBlur(6)), tuple(s // 3 for s in image.size)
        box = (*edges, 2 * edges[0], 2 * edges[1])
        ground.paste(image.crop(box), box)
        return ground

    assert blurred(photographs) == 0
    assert blurred(map(before_a_blurred_ground, photographs)) == 0
    for radius in (5, 16):
        assert blurred(image.filter(ImageFilter.GaussianBlur(radius)) for image in photographs) == 1
    generator = np.random.default_rng(1)
    drawings = [draw(s, height=256, width=256, generator=generator) for s in all_subjects()[::40]]
    assert blurred(map(Image.fromarray, drawings)) == 0


@pytest.fixture
def folder(tmp_path, photographs):
    for name, image in zip(PHOTOGRAPHS[:3], photographs, strict=False):
        image.save(tmp_path / f"{Path(name).stem}.png")
    photographs[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.jpg")
    photographs[1].filter(ImageFilter.GaussianBlur(8)).save(tmp_path / "soft.png")
    return tmp_path


def pictures_of(folder):
    return scan(folder_dataset(str(folder)), FileStamps(folder / "stat.json")).pictures


def warnings_of(folder, monkeypatch=None):
    """Returns what is told, and how many pictures were looked at for it."""
    looked, row = [], looks_module._row
    if monkeypatch:
        monkeypatch.setattr(looks_module, "_row", lambda picture: looked.append(picture.name) or row(picture))
    looks, pictures = Looks(folder / "looks.npz"), pictures_of(folder)
    looks.look_at(pictures)
    if monkeypatch:
        monkeypatch.undo()
    return list(look_warnings(pictures, looks.seen())), sorted(looked)


ALIKE = ("astronaut.png = mirrored.jpg mirrored", "brick.png = soft.png")
BLURRED = "1 picture blurred everywhere: soft.png"


def test_what_was_seen_is_kept_by_content(folder, monkeypatch):
    told, looked = warnings_of(folder, monkeypatch)
    assert told == [f"4 pictures nearly the same as another: {', '.join(ALIKE)}", BLURRED] and len(looked) == 5
    assert warnings_of(folder, monkeypatch) == (told, [])
    (folder / "camera.png").rename(folder / "renamed.png")
    assert warnings_of(folder, monkeypatch) == (told, [])
    (folder / "mirrored.jpg").rename(folder.parent / "mirrored.jpg")
    less = [f"2 pictures nearly the same as another: {ALIKE[1]}", BLURRED]
    assert warnings_of(folder, monkeypatch) == (less, [])
    (folder.parent / "mirrored.jpg").rename(folder / "mirrored.jpg")
    assert warnings_of(folder, monkeypatch) == (told, ["mirrored.jpg"])


def test_no_picture_may_be_left(folder):
    warnings_of(folder)
    looks = Looks(folder / "looks.npz")
    looks.look_at([])
    assert not looks.seen()


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_memory_is_made_anew(folder, monkeypatch, damage):
    told, _ = warnings_of(folder)
    whole = (folder / "looks.npz").read_bytes()
    (folder / "looks.npz").write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again, looked = warnings_of(folder, monkeypatch)
    assert again == told and len(looked) == 5


def test_a_picture_that_cannot_be_decoded_looks_like_none_and_is_not_tried_again(folder, monkeypatch):
    for number in range(2):  # of equal headers and torn pixels
        data = (folder / "astronaut.png").read_bytes()
        (folder / f"torn-{number}.png").write_bytes(data[: len(data) // 2 - number])
    told, _ = warnings_of(folder)
    assert told[0] == "2 pictures left out, which cannot be decoded: torn-0.png, torn-1.png"
    assert not any("torn" in text for text in told[1:])
    assert warnings_of(folder, monkeypatch)[1] == []
