"""One change at a time, and exactly the rows that it makes the encode stages encode again.

The stages run as they are, up to the encoders, which are replaced by ones that note what they are asked for: what a
change re-encodes is decided before any weight is read.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_base import TinyBase, write_tiny_base

from sd3pipe import cli
from sd3pipe.cache.rows import from_numpy

CAPTIONS = {
    "a": "a red square",
    "b": "a green square, on a wall",
    "c": "a blue square",
    "d": "a face",
    "e": "two faces",
}
SIZES = {"a": (96, 64), "b": (64, 64), "c": (64, 112), "d": (80, 80), "e": (128, 64)}
SUBSETS = {"photos": "abc", "portraits": "de"}
PICTURES = {f"{name}.png" for name in CAPTIONS}
TEXTS = {*CAPTIONS.values(), ""}


@dataclass
class Project:
    """A dataset of two subsets, the second with masks, on a tiny base; everything can be changed."""

    folder: Path
    base: TinyBase
    model: Path
    general: dict[str, object] = field(default_factory=dict)
    dataset: dict[str, object] = field(default_factory=dict)
    photos: dict[str, object] = field(default_factory=dict)
    portraits: dict[str, object] = field(default_factory=dict)
    reverse: bool = False
    latents_options: list[str] = field(default_factory=list)
    text_options: list[str] = field(default_factory=list)

    def picture(self, name: str) -> Path:
        subset = next(subset for subset, names in SUBSETS.items() if name in names)
        return self.folder / subset / f"{name}.png"

    def caption(self, name: str) -> Path:
        return self.picture(name).with_suffix(".txt")

    def mask(self, name: str) -> Path:
        return self.folder / "masks" / f"{name}.png"

    def write_dataset_file(self) -> Path:
        subsets = [{"image_dir": "photos", **self.photos}]
        subsets += [{"image_dir": "portraits", "conditioning_data_dir": "masks", **self.portraits}]
        subsets = subsets[::-1] if self.reverse else subsets
        paths = ("image_dir", "conditioning_data_dir")
        subsets = [{k: str(self.folder / v) if k in paths else v for k, v in s.items()} for s in subsets]
        buckets = {"resolution": 64, "enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 16}
        content = {"general": self.general, "datasets": [{**buckets, **self.dataset, "subsets": subsets}]}
        (self.folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        return self.folder / "dataset.json"


def write_pictures(folder: Path) -> None:
    generator = np.random.default_rng(0)
    (folder / "masks").mkdir()
    for subset, names in SUBSETS.items():
        (folder / subset).mkdir()
        for name in names:
            width, height = SIZES[name]
            pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / subset / f"{name}.png")
            (folder / subset / f"{name}.txt").write_text(CAPTIONS[name], encoding="utf-8")
            if subset == "portraits":
                Image.new("L", (width, height), 200).save(folder / "masks" / f"{name}.png")


def encode(project: Project, monkeypatch) -> tuple[set[str], set[str]]:
    """Runs both encode stages; returns the rows of pictures ("a.png", "a.png flipped") and the texts they encoded."""
    from sd3pipe.encoding.text_encoding import tokenized as really_tokenized

    pictures: list[str] = []
    texts: list[str] = []
    row = {"moments": from_numpy(np.zeros((2, 2), np.float32))}

    def encoded_rows(keys, views, *_):
        for key, view in zip(keys, views, strict=True):
            pictures.append(Path(view.picture.name).name + (" flipped" if view.flip else ""))
            yield key, row

    def tokenized(asked, *rest):
        texts.extend(asked)
        return really_tokenized(asked, *rest)

    with monkeypatch.context() as patch:
        patch.chdir(project.folder)  # the repository is a project with parameters of its own
        patch.setattr("sd3pipe.encoding.latent_rows.encoded_rows", encoded_rows)
        patch.setattr("sd3pipe.encoding.text_encoding.tokenized", tokenized)
        patch.setattr(
            "sd3pipe.encoding.text_encoding.encoded_texts",
            lambda tokens, *_: (row for _ in tokens["t5xxl"].lengths),
        )
        dataset = project.write_dataset_file()
        model = [f"--model={project.model}", f"--dataset={dataset}"]
        caches = project.folder / "caches"
        latents = ["encode-latents", *model, f"--out={caches / 'latents'}", *project.latents_options]
        encoders = project.base.encoder_options()
        text = ["encode-text", *model, *encoders, f"--out={caches / 'text'}", *project.text_options]
        assert cli.run(latents) == 0
        assert cli.run(text) == 0
    assert len(pictures) == len(set(pictures)) and len(texts) == len(set(texts)), "something was encoded twice"
    return set(pictures), set(texts)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The project as it is before any change, encoded."""
    folder = tmp_path_factory.mktemp("mutations") / "project"
    folder.mkdir()
    base = write_tiny_base(folder.parent / "base", variant="sd3-medium")
    write_pictures(folder)
    project = Project(folder=folder, base=base, model=base.model)
    patch = pytest.MonkeyPatch()
    assert encode(project, patch) == (PICTURES, TEXTS)
    return project


@pytest.fixture
def project(encoded, tmp_path):
    """A copy of the project that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(encoded.folder, folder)
    return Project(folder=folder, base=encoded.base, model=encoded.model)


def nothing(project):
    pass


def one_pixel(project):
    with Image.open(project.picture("a")) as image:
        image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
        image.save(project.picture("a"))


def save_again_with_equal_pixels(project):
    before = project.picture("a").read_bytes()
    with Image.open(project.picture("a")) as image:
        image.save(project.picture("a"), compress_level=1)
    assert project.picture("a").read_bytes() != before


def edit_a_mask(project):
    with Image.open(project.mask("d")) as image:
        image.putpixel((3, 3), 10)
        image.save(project.mask("d"))


def caption(name, text) -> Callable[[Project], None]:
    def write(project):
        project.caption(name).write_bytes(text if isinstance(text, bytes) else text.encode())

    write.__name__ = f"caption {text!r}"
    return write


def flip_a_bit(prefix) -> Callable[[Project], None]:
    def flip(project):
        """Changes the lowest bit of the first element of the first tensor whose name starts so."""
        data = bytearray(project.model.read_bytes())
        length = int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8 : 8 + length])
        name = min(name for name in tensors if name.startswith(prefix))
        data[8 + length + tensors[name]["data_offsets"][0]] ^= 1
        project.model = project.folder / "model.safetensors"
        project.model.write_bytes(data)

    flip.__name__ = f"one bit of {prefix}"
    return flip


def setting(place, **values) -> Callable[[Project], None]:
    def change(project):
        getattr(project, place).update(values)

    change.__name__ = f"{place} {values}"
    return change


def options(stage, *words) -> Callable[[Project], None]:
    def change(project):
        getattr(project, f"{stage}_options").extend(words)

    change.__name__ = " ".join(words)
    return change


def rename_a_picture(project):
    project.picture("d").rename(project.picture("d").with_name("zebra.png"))
    project.caption("d").rename(project.caption("d").with_name("zebra.txt"))
    project.mask("d").rename(project.mask("d").with_name("zebra.png"))


def move_the_folder(project):
    (project.folder / "deeper").mkdir()
    (project.folder / "photos").rename(project.folder / "deeper" / "pictures")
    project.photos["image_dir"] = "deeper/pictures"


def touch_everything(project):
    for path in project.folder.glob("p*/*"):
        os.utime(path, (random.Random(path.name).randrange(10**9), 10**9))


def reorder_the_subsets(project):
    project.reverse = True


def add_a_picture(project):
    Image.new("RGB", (64, 64), (9, 9, 9)).save(project.folder / "photos" / "new.png")
    (project.folder / "photos" / "new.txt").write_text("something new")


def add_a_copy_with_the_same_caption(project):
    shutil.copy(project.picture("a"), project.folder / "photos" / "copy.png")
    shutil.copy(project.caption("a"), project.folder / "photos" / "copy.txt")


def remove_a_picture(project):
    project.picture("b").unlink()
    project.caption("b").unlink()


def use_the_other_caption_ending(project):
    project.caption("a").rename(project.caption("a").with_suffix(".caption"))


def change_a_tokenizer(project):
    folder = project.folder / "tokenizers"
    shutil.copytree(project.base.tokenizers, folder)
    path = folder / "clip_l" / "vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    first, second = sorted(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    for copy in folder.glob("clip_l/tokenizer.json"):
        copy.unlink()
    project.text_options += [f"--tokenizers={folder}"]


NONE: set[str] = set()
FLIPPED = {"a.png flipped", "b.png flipped", "c.png flipped"}
PREFIXED = {f"photo of {CAPTIONS[name]}" for name in "abc"}
T5 = "text_encoders.t5xxl."

MUTATIONS = [
    (nothing, NONE, NONE),
    # what changes a row's numbers
    (one_pixel, {"a.png"}, NONE),
    (save_again_with_equal_pixels, {"a.png"}, NONE),
    (edit_a_mask, {"d.png"}, NONE),
    (caption("a", "a red triangle"), NONE, {"a red triangle"}),
    (caption("a", "a  red square"), NONE, {"a  red square"}),
    (caption("a", "A red square"), NONE, {"A red square"}),
    (flip_a_bit("first_stage_model.encoder."), PICTURES, NONE),
    (flip_a_bit("text_encoders.clip_l."), NONE, TEXTS),
    (flip_a_bit("text_encoders.clip_g."), NONE, TEXTS),
    (flip_a_bit(T5), NONE, TEXTS),
    (change_a_tokenizer, NONE, TEXTS),
    (options("text", "--t5xxl-max-token-length=77"), NONE, TEXTS),
    (options("text", "--t5-pad-to=20"), NONE, TEXTS),
    (options("text", "--padding=zero"), NONE, TEXTS),
    (options("text", "--apply-t5-attn-mask"), NONE, TEXTS),
    (options("text", "--apply-lg-attn-mask"), NONE, TEXTS),
    (options("text", "--text-dtype=float32"), NONE, TEXTS),
    (options("latents", "--latent-dtype=float32"), PICTURES, NONE),
    (options("latents", "--latent-mode=mean"), PICTURES, NONE),
    (options("latents", "--vae-dtype=bfloat16"), PICTURES, NONE),
    (setting("dataset", resolution=96), PICTURES, NONE),
    (setting("dataset", bucket_reso_steps=32), {"a.png", "c.png", "e.png"}, NONE),
    (setting("photos", flip_aug=True), FLIPPED, NONE),
    (setting("photos", resize_interpolation="nearest"), {"a.png", "c.png"}, NONE),
    (setting("photos", caption_prefix="photo of"), NONE, PREFIXED),
    (add_a_picture, {"new.png"}, {"something new"}),
    # what does not
    (caption("a", b"\xef\xbb\xbfa red square\r\n"), NONE, NONE),
    (caption("a", "a red square\n"), NONE, NONE),
    (flip_a_bit("model.diffusion_model."), NONE, NONE),
    (rename_a_picture, NONE, NONE),
    (move_the_folder, NONE, NONE),
    (touch_everything, NONE, NONE),
    (reorder_the_subsets, NONE, NONE),
    (remove_a_picture, NONE, NONE),
    (add_a_copy_with_the_same_caption, NONE, NONE),
    (use_the_other_caption_ending, NONE, NONE),
    (setting("photos", num_repeats=7), NONE, NONE),
    (setting("photos", is_reg=True), NONE, NONE),
    (setting("photos", loss_weight=0.5), NONE, NONE),
    (setting("photos", caption_dropout_rate=0.5), NONE, NONE),
    (setting("photos", name="other"), NONE, NONE),
    (setting("dataset", batch_size=4), NONE, NONE),
    (setting("dataset", max_bucket_reso=2048), NONE, NONE),
    (options("latents", "--vae-batch-size=3"), NONE, NONE),
    (options("latents", "--max-data-loader-n-workers=1"), NONE, NONE),
    (options("latents", "--seed=7"), NONE, NONE),
    (options("latents", "--rehash"), NONE, NONE),
    (options("text", "--text-encoder-batch-size=3"), NONE, NONE),
    (options("text", "--caption-variants=3"), NONE, NONE),
    (options("text", "--verify-weights"), NONE, NONE),
    (options("text", "--threads=1"), NONE, NONE),
]


@pytest.mark.parametrize(("change", "pictures", "texts"), MUTATIONS, ids=[m[0].__name__ for m in MUTATIONS])
def test_a_change_encodes_exactly_the_rows_it_concerns(project, monkeypatch, change, pictures, texts):
    change(project)
    assert encode(project, monkeypatch) == (pictures, texts)


def test_the_table_has_many_changes():
    assert len(MUTATIONS) >= 25
