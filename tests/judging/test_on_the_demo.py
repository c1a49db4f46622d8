"""On the demo, with its tiny judge model: a copy is called one, though its picture comes twelve times."""

from pathlib import Path

import pytest
from support.command_line import sd3pipe

from sd3pipe.demo.base_files import JUDGE, MODEL, T5_LENGTH, TOKENIZERS
from sd3pipe.demo.drawings import NEW_WORD
from sd3pipe.demo.project import PROMPTED, picture_files, prompt_line
from sd3pipe.judgement import Scores, read_judgement

DATASET = """\
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "pictures"
"""


def judged(folder: Path, pictures: dict[str, bytes], steps: int) -> Scores:
    """Trains on pictures with captions and returns what judge says of the adapter, beside the base."""
    (folder / "pictures").mkdir()
    for name, content in pictures.items():
        (folder / "pictures" / name).write_bytes(content)
    (folder / "dataset.toml").write_text(DATASET)
    (folder / "prompts.txt").write_text("\n".join(prompt_line(subject, 1) for subject in PROMPTED))
    model, t5 = ("--model", MODEL), ("--tokenizers", TOKENIZERS, "--t5xxl-max-token-length", T5_LENGTH)
    sd3pipe("encode-text", *model, *t5, "--dataset", folder / "dataset.toml", "--out", folder / "caches/text")
    sd3pipe("encode-text", *model, *t5, "--sample-prompts", folder / "prompts.txt", "--out", folder / "caches/prompts")
    sd3pipe("encode-latents", *model, "--dataset", folder / "dataset.toml", "--out", folder / "caches/latents")
    sd3pipe(
        "train", *model, "--text", folder / "caches/text", "--latents", folder / "caches/latents",
        "--out", folder / "r", "--network-dim", 32, "--learning-rate", 3e-3, "--training-shift", 5.0,
        "--train-batch-size", 8, "--gradient-checkpointing", "off", "--max-train-steps", steps,
    )  # fmt: skip
    sd3pipe(
        "judge", *model, "--adapter", folder / "r", "--prompts", folder / "caches/prompts", "--checkpoints", steps,
        "--latents", folder / "caches/latents", "--judge-model", JUDGE, "--trigger", NEW_WORD,
        "--seeds", "1,2", "--out", folder / "r/judge",
    )  # fmt: skip
    (scores,) = read_judgement(folder / "r/judge").scores
    return scores


def drawings() -> list[tuple[bytes, str]]:
    """Returns the demo's pictures of the new shape with their captions."""
    files = picture_files()
    names = [name for name in files if name.startswith("pictures/") and name.endswith(".png")]
    return [(files[name], files[name.replace(".png", ".txt")].decode()) for name in names]


@pytest.mark.slow
def test_over_training_on_one_picture_is_called_copying(tmp_path):
    """It goes by every caption: under its own alone, the other colours' words would still be followed."""
    picture, _ = drawings()[0]
    pictures = {}
    for number, (_, caption) in enumerate(drawings()):
        pictures[f"{number}.png"], pictures[f"{number}.txt"] = picture, caption.encode()
    scores = judged(tmp_path, pictures, 300)
    assert scores.close and scores.copying.low > 0
