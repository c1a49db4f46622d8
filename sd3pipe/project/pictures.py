"""What lies in a picture folder, and the dataset file for it."""

import os
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.data.folders import is_picture_name
from sd3pipe.errors import InputError
from sd3pipe.params.stage_file import toml_value

_CAPTION_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFolder:
    """Counts of a folder; `recursive` if its pictures lie in subfolders."""

    path: Path
    pictures: int
    captions: int
    recursive: bool


def look_into(folder: Path) -> PictureFolder:
    """Counts pictures and their caption files. Raises InputError if there is no picture."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder: pass --images DIR with the pictures to learn from")
    pictures = captions = 0
    recursive = False
    for here, _, names in os.walk(folder):
        present = set(names)
        here_pictures = [name for name in names if is_picture_name(name)]
        recursive |= bool(here_pictures) and Path(here) != folder
        pictures += len(here_pictures)
        captions += sum(
            any(Path(name).stem + ending in present for ending in _CAPTION_ENDINGS) for name in here_pictures
        )
    if not pictures:
        raise InputError(f"{folder}: holds no picture: pass --images DIR with the pictures to learn from")
    return PictureFolder(path=folder, pictures=pictures, captions=captions, recursive=recursive)


def dataset_toml(folder: PictureFolder, image_dir: str, *, resolution: int, trigger: str | None) -> str:
    """Returns the dataset file: sd-scripts' format, aspect buckets on, nothing enlarged."""
    lines = [
        "# What to learn from: sd-scripts' dataset format. `sd3pipe preview` draws what training will see.",
        "[general]",
        "enable_bucket = true",
        "bucket_no_upscale = true    # small pictures stay small; they train in buckets of their own",
        "caption_dropout_rate = 0.05 # as often an empty caption, which classifier-free guidance needs",
        "",
        "[[datasets]]",
        f"resolution = {resolution}",
        *_bucket_limits(resolution),
        "",
        "[[datasets.subsets]]",
        f"image_dir = {toml_value(image_dir)}",
        "num_repeats = 1",
        "# validation_split = 0.1    # holds out a tenth of the pictures to measure the loss on; wants some hundred",
        *(["recursive = true"] if folder.recursive else []),
        *_trigger_lines(folder, trigger),
    ]
    return "\n".join(lines) + "\n"


def _bucket_limits(resolution: int) -> list[str]:
    """Buckets may be half to twice as long as the square; sd-scripts' own limits fit 512 to 1024 only."""
    if 512 <= resolution <= 1024:
        return []
    step = 64 if resolution >= 256 else 32
    return [
        f"min_bucket_reso = {max(step, resolution // 2 // step * step)}",
        f"max_bucket_reso = {max(1024, 2 * resolution // step * step)}",
        *([f"bucket_reso_steps = {step}"] if step != 64 else []),
    ]


def _trigger_lines(folder: PictureFolder, trigger: str | None) -> list[str]:
    """The trigger stands before every caption, and alone where a picture has none."""
    if trigger is None:
        return []
    if folder.captions == 0:
        return [f"class_tokens = {toml_value(trigger)} # the caption of pictures without a caption file"]
    lines = [f"caption_prefix = {toml_value(trigger + ',')}"]
    if folder.captions < folder.pictures:
        lines.append('class_tokens = "a picture" # for pictures without a caption file, behind the prefix')
    return lines


def prompts_txt(trigger: str | None, resolution: int) -> str:
    """Returns sample prompts in sd-scripts' form: one with what is learnt, one that should stay as it was."""
    subject = trigger or "a photograph of what the pictures show"
    return (
        "# One prompt a line; --w --h size, --d seed, --n negative prompt, --s steps, --l guidance scale.\n"
        f"{subject} --w {resolution} --h {resolution} --d 1\n"
        f"{subject}, seen from far away --w {resolution} --h {resolution} --d 2\n"
        f"a wooden chair in a garden --w {resolution} --h {resolution} --d 3\n"
    )
