"""How many changed copies of photographs are found, how many others are taken for one, and how long it takes.

    python benchmarks/near_duplicates.py [--pictures 2000 10000]

The photographs are scikit-image's. CPU seconds; comparing takes one core, looking at pictures all.
"""

import argparse
import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from sd3pipe.data.images import decode
from sd3pipe.data.looks import find_nearest, is_blurred, look_of

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg", "text.png", "logo.png",
    "horse.png",
)  # fmt: skip
Change = Callable[[Image.Image], Image.Image]


def main() -> None:
    """Prints a line for each kind of change, and for each number of pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[2000, 10_000])
    options = parser.parse_args()
    images = [photograph(name) for name in PHOTOGRAPHS]
    looks = [look_of(np.asarray(image)) for image in images]
    for name, change in changes().items():
        copies = [look_of(np.asarray(change(image))) for image in images]
        table = compared([*looks, *copies])
        found = sum(table["nearest"][len(looks) + number] == number for number in range(len(looks)))
        print(f"{name}: {found} of {len(looks)} found")
    parts = [look_of(np.asarray(part)) for image in images for part in quarters(image)]
    table = compared([*looks, *parts])
    names = [*PHOTOGRAPHS, *(f"{name}, part {number}" for name in PHOTOGRAPHS for number in range(4))]
    wrong = [(names[row], names[near]) for row, near in enumerate(table["nearest"]) if near >= 0]
    print(f"photographs and their quarters: {len(table['nearest'])}, taken for alike: {wrong}")
    for radius in (0, 1, 2, 3, 4, 5, 8, 16):
        blurred = [name for name, image in zip(PHOTOGRAPHS, images, strict=True) if told_blurred(image, radius)]
        print(f"blurred by a Gaussian of {radius} pixels of 512: {len(blurred)} told {blurred[:3]}")
    for side in (1024, 3500):
        print(f"a JPEG of {side} x {side}: {1000 * seconds_of_one(side):.0f} ms")
    for number in options.pictures:
        print(f"{number:,} pictures compared: {seconds_of_comparing(number):.1f} s")


def photograph(name: str) -> Image.Image:
    image = Image.open(Path(skimage.__file__).parent / "data" / name)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def changes() -> dict[str, Change]:
    return {
        "saved as JPEG of quality 40": lambda image: as_jpeg(image, 40),
        "saved as JPEG of quality 10": lambda image: as_jpeg(image, 10),
        "half the size": lambda image: resized(image, 0.5),
        "a quarter of the size": lambda image: resized(image, 0.25),
        "twice the size": lambda image: resized(image, 2),
        "1 % cut off": lambda image: cut(image, 0.005),
        "4 % cut off each way": lambda image: cut(image, 0.02),
        "10 % cut off each way": lambda image: cut(image, 0.05),
        "20 % cut off each way": lambda image: cut(image, 0.1),
        "brighter by a tenth": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        "more contrast by 30 %": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
        "paler by 40 %": lambda image: ImageEnhance.Color(image).enhance(0.6),
        "with a line of text": stamped,
        "mirrored, JPEG of quality 40": lambda image: as_jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 40),
        "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    }


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cut(image: Image.Image, share: float) -> Image.Image:
    """Returns a picture without a share of it on each side."""
    width, height = image.size
    return image.crop((int(width * share), int(height * share), int(width * (1 - share)), int(height * (1 - share))))


def stamped(image: Image.Image) -> Image.Image:
    image = image.copy()
    place = (image.width * 0.6, image.height * 0.9)
    ImageDraw.Draw(image).text(place, "(c) somebody 2020", fill="white", font_size=image.height // 18)
    return image


def quarters(image: Image.Image) -> list[Image.Image]:
    width, height = image.width // 2, image.height // 2
    corners = itertools.product((0, width), (0, height))
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]


def told_blurred(image: Image.Image, radius: int) -> bool:
    image = image.copy()
    image.thumbnail((512, 512), Image.Resampling.BOX)
    return is_blurred(look_of(np.asarray(image.filter(ImageFilter.GaussianBlur(radius)) if radius else image)))


def compared(looks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    table = {name: np.stack([look[name] for look in looks]) for name in looks[0]}
    return with_nearest(table, len(looks))


def with_nearest(table: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    table |= {"hash": np.arange(number)[:, None], "nearest": np.full(number, -1, np.int32)}
    table |= {"distance": np.full(number, 257, np.int16), "flipped": np.zeros(number, bool)}
    find_nearest(table, np.arange(number))
    return table


def seconds_of_one(side: int) -> float:
    """Returns the CPU seconds of looking at one JPEG."""
    buffer = io.BytesIO()
    photograph("astronaut.png").resize((side, side)).save(buffer, "JPEG", quality=90)
    start, times = time.process_time(), 10
    for _ in range(times):
        look_of(decode(buffer.getvalue(), ".jpg", keep_alpha=False, at_least_px=512))
    return (time.process_time() - start) / times


def seconds_of_comparing(number: int) -> float:
    """Returns the CPU seconds of comparing pictures with random hashes, whose mean levels spread as photographs' do."""
    generator = np.random.default_rng(0)
    table = {name: generator.integers(0, 2**64, (number, 4), np.uint64) for name in ("bits", "mirrored")}
    levels = generator.normal(115, 45, (number, 1, 1, 1)) + generator.normal(0, 40, (number, 4, 4, 3))
    table["colours"] = levels.clip(0, 255).astype(np.uint8)
    start = time.process_time()
    with_nearest(table, number)
    return time.process_time() - start


if __name__ == "__main__":
    main()
