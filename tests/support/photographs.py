"""Photographs that scikit-image carries, with captions written by hand, as a user's picture folder."""

from pathlib import Path

from PIL import Image

CAPTIONS = {
    "astronaut.png": "a smiling astronaut in an orange suit, a shuttle model behind her",
    "chelsea.png": "a tabby cat looking up, close portrait",
    "coffee.png": "a cup of coffee on a wooden table, seen from above",
    "rocket.jpg": "a rocket on its launch pad in the evening",
    "hubble_deep_field.jpg": "hundreds of galaxies on a black sky",
    "motorcycle_left.png": "a motorcycle in a garage",
}


def write_photographs(folder: Path, names: tuple[str, ...] = tuple(CAPTIONS), longest_side: int = 160) -> Path:
    """Writes the named photographs, reduced, with a caption file each; returns the folder."""
    import skimage

    folder.mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    for name in names:
        with Image.open(source / name) as image:
            image.thumbnail((longest_side, longest_side))
            image.convert("RGB").save(folder / name)
        (folder / Path(name).with_suffix(".txt")).write_text(CAPTIONS[name] + "\n", encoding="utf-8")
    return folder


def write_dataset_file(file: Path, image_dir: Path, *, resolution: int = 128, extra: str = "") -> Path:
    """Writes a dataset file in sd-scripts' form over one folder."""
    file.write_text(
        f"""
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 32
caption_dropout_rate = 0.1

[[datasets]]
resolution = {resolution}

[[datasets.subsets]]
image_dir = "{image_dir}"
{extra}
""",
        encoding="utf-8",
    )
    return file
