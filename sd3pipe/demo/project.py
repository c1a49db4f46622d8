"""The demo's project: a dozen drawings of a shape that the base does not know, prompts, and its parameter files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from sd3pipe.config import PROJECT_FILE
from sd3pipe.demo.base_files import MODEL, T5_LENGTH, TOKENIZERS
from sd3pipe.demo.drawings import NEW_WORD, OUTLINES, WORDINGS, Subject, all_subjects, draw

PICTURE_SIZES = ((192, 192), (288, 192), (192, 288), (256, 256), (320, 208), (144, 144))  # width, height in pixels
SIDE_PX = 64
RUN = f"runs/{NEW_WORD}"
STEPS, SCALE = 28, 3.0  # of the samples
_SEED = 7
_KNOWN_PER_SHAPE = 10

LEARNT = (  # small ones, which are harder, more often, and most of them in square pictures, as they are prompted
    Subject(shape=NEW_WORD, colour="purple", size="small", background="grey"),
    Subject(shape=NEW_WORD, colour="yellow", size="large", background="blue"),
    Subject(shape=NEW_WORD, colour="green", size="small", background="yellow"),
    Subject(shape=NEW_WORD, colour="white", size="small", background="purple"),
    Subject(shape=NEW_WORD, colour="green", size="large", background="black"),
    Subject(shape=NEW_WORD, colour="yellow", size="small", background="green"),
    Subject(shape=NEW_WORD, colour="red", size="small", background="black"),
    Subject(shape=NEW_WORD, colour="blue", size="large", background="orange"),
    Subject(shape=NEW_WORD, colour="orange", size="small", background="red"),
    Subject(shape=NEW_WORD, colour="blue", size="small", background="white"),
    Subject(shape=NEW_WORD, colour="orange", size="large", background="grey"),
    Subject(shape=NEW_WORD, colour="black", size="large", background="yellow"),
)
HELD_OUT = (  # never trained on: the validation loss is measured on them
    Subject(shape=NEW_WORD, colour="orange", size="small", background="blue"),
    Subject(shape=NEW_WORD, colour="white", size="large", background="green"),
    Subject(shape=NEW_WORD, colour="green", size="large", background="yellow"),
    Subject(shape=NEW_WORD, colour="black", size="small", background="white"),
)
PROMPTED = (  # none of these is among the pictures; the first four are drawn while it trains
    Subject(shape=NEW_WORD, colour="red", size="large", background="blue"),
    Subject(shape=NEW_WORD, colour="green", size="small", background="white"),
    Subject(shape="circle", colour="yellow", size="large", background="purple"),
    Subject(shape="triangle", colour="blue", size="small", background="orange"),
    Subject(shape=NEW_WORD, colour="purple", size="large", background="white"),
    Subject(shape=NEW_WORD, colour="blue", size="small", background="yellow"),
    Subject(shape="ring", colour="red", size="large", background="white"),
    Subject(shape="diamond", colour="white", size="large", background="red"),
)
# rank, rate, shift and steps are enough for one shape on this base; a real model wants the defaults of a new project
_TRAIN = """\
network_dim = 32
learning_rate = 3e-3
training_shift = 5.0
lr_scheduler = "cosine"
max_train_steps = {steps}
train_batch_size = 8
save_every_n_steps = {save}
sample_every_n_steps = {save}
max_sample_prompts = 4
gradient_checkpointing = false

# The empty caption is what guidance moves away from: it must not learn the new shape.
[subsets.pictures]
caption_dropout_rate = 0.0

# On the known shapes the base's own prediction is the target, so the adapter leaves them as they are.
[subsets.regularisation]
caption_dropout_rate = 0.1
diff_output_preservation = true
"""


def project_texts(*, steps: int) -> dict[str, str]:
    """Returns the text files of the project by name."""
    paths = {
        "model": MODEL.as_posix(),
        "tokenizers": TOKENIZERS.as_posix(),
        "dataset": "dataset.toml",
        "sample_prompts": "sample_prompts.txt",
        "caches": "caches",
        "run": RUN,
        "export": f"exports/{NEW_WORD}.safetensors",
    }
    lines = "".join(f'{key} = "{value}"\n' for key, value in paths.items())
    head = "# The demo's project; `sd3pipe run` in this folder does what is not up to date.\n[paths]\n"
    return {
        ".gitignore": "*\n",  # in whatever repository it is tried, it leaves nothing to commit
        PROJECT_FILE: head + lines,
        "dataset.toml": _DATASET,
        "sample_prompts.txt": "".join(f"{prompt_line(subject, seed)}\n" for seed, subject in enumerate(PROMPTED, 1)),
        "stages/encode_text.toml": f"t5xxl_max_token_length = {T5_LENGTH}\n",
        "stages/train.toml": _TRAIN.format(steps=steps, save=max(1, steps // 2)),
    }


def known_subjects() -> list[Subject]:
    """Returns what the regularisation pictures show: each known shape in a few colours, none of them prompted."""
    generator = np.random.default_rng(_SEED)
    known = [
        subject
        for shape in OUTLINES
        for subject in generator.permutation(np.array(all_subjects((shape,)), dtype=object)).tolist()[:_KNOWN_PER_SHAPE]
    ]
    return [subject for subject in known if subject not in PROMPTED]


def picture_files() -> dict[str, bytes]:
    """Returns the pictures as PNG and their captions as text, by name."""
    generator = np.random.default_rng(_SEED)
    files: dict[str, bytes] = {}
    for folder, subjects in (("pictures", LEARNT), ("regularisation", known_subjects()), ("held-out", HELD_OUT)):
        for number, subject in enumerate(subjects):
            width, height = PICTURE_SIZES[number % len(PICTURE_SIZES)]
            data = io.BytesIO()
            Image.fromarray(draw(subject, height=height, width=width, generator=generator)).save(data, format="PNG")
            files[f"{folder}/{subject.shape}-{number:02d}.png"] = data.getvalue()
            files[f"{folder}/{subject.shape}-{number:02d}.txt"] = subject.caption(number // 2 % len(WORDINGS)).encode()
    return files


def prompt_line(subject: Subject, seed: int) -> str:
    """Returns a line of a prompt file."""
    return f"{subject.caption()} --w {SIDE_PX} --h {SIDE_PX} --s {STEPS} --l {SCALE:g} --d {seed}"


def write_files(folder: Path, *, steps: int) -> dict[Path, bytes]:
    """Returns what is to be written below `folder`: every file of the project with its content."""
    texts = {name: text.encode() for name, text in project_texts(steps=steps).items()}
    return {folder / name: content for name, content in {**texts, **picture_files()}.items()}


_DATASET = """\
# A dozen drawings of one new shape, in several sizes and aspects: they fall into three buckets.
[general]
enable_bucket = true
caption_extension = ".txt"
caption_dropout_rate = 0.05

[[datasets]]
resolution = [96, 64]
min_bucket_reso = 64
max_bucket_reso = 96
bucket_reso_steps = 32

[[datasets.subsets]]
image_dir = "pictures"
flip_aug = true
num_repeats = 6

# Drawings of the shapes that the base knows already, so that it does not forget them.
[[datasets.subsets]]
image_dir = "regularisation"
is_reg = true
num_repeats = 1

# Drawings of the new shape that are only looked at, to measure how well it is learnt.
[[datasets.subsets]]
image_dir = "held-out"
validation_split = 1.0
"""
