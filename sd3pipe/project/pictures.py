"""What lies in a picture folder, and the dataset file for it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.data.dataset_file import folder_dataset
from sd3pipe.data.folders import is_picture_name, walked
from sd3pipe.data.image_dirs import listed_folder, read_image_dir
from sd3pipe.data.left_out import repeats_of
from sd3pipe.errors import InputError
from sd3pipe.params.stage_file import toml_value
from sd3pipe.remote import is_address

_CAPTION_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFolder:
    """Counts of one subset's folder; `recursive` if its pictures lie in subfolders.

    `repeats` and `class_tokens` stand in the name of a folder as sd-scripts' train_data_dir has them: 10_mycat.
    """

    path: Path | str  # an address is text
    pictures: int
    captions: int
    recursive: bool
    repeats: int = 1
    class_tokens: str | None = None


def look_into(images: str) -> list[PictureFolder]:
    """Counts pictures and their caption files: of the folder as one, or, if some are there, of each `10_name` below.

    Beside those each folder with pictures counts by itself. Whatever else an image_dir may name counts as one.
    Raises InputError if there is no picture.
    """
    folder = Path(images)
    if is_address(images) or listed_folder(folder) != folder:
        return _held(images if is_address(images) else folder, images)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder: pass --images DIR with the pictures to learn from")
    names: dict[Path, Collection[str]] = {here: files for _, here, files, _ in walked(folder, recursive=True)}
    holding = [here for here in names if any(map(is_picture_name, names[here]))]
    if not holding:
        return _held(folder, images)
    roots = {here: _repeated(here, folder) or here for here in holding}
    if not any(_repeated(here, folder) for here in holding):
        roots = dict.fromkeys(holding, folder)
    return [
        _counted(root, folder, {here: names[here] for here in holding if roots[here] == root})
        for root in sorted({*roots.values()})
    ]


def _held(path: Path | str, images: str) -> list[PictureFolder]:
    """Returns the counts of pictures that share files, or lie in a bucket. Raises InputError where there are none."""
    entries = read_image_dir(folder_dataset(images).subsets[0], None).entries
    if not entries:
        raise InputError(f"{images}: holds no picture: pass --images DIR with the pictures to learn from")
    captions = sum(entry.caption is not None for entry in entries)
    below = any(Path(str(entry.place.file)).parent not in (path, Path(path).parent) for entry in entries)
    return [PictureFolder(path=path, pictures=len(entries), captions=captions, recursive=below)]


def _repeated(here: Path, top: Path) -> Path | None:
    """Returns the highest folder below `top` on the way to `here` that is named like 10_mycat."""
    way = [path for path in (*reversed(here.parents), here) if path.is_relative_to(top) and path != top]
    return next((path for path in way if repeats_of(path.name)), None)


def _counted(root: Path, top: Path, names: Mapping[Path, Collection[str]]) -> PictureFolder:
    """Returns the counts of a subset whose pictures lie in some folders, given with their files' names."""
    pictures = [(here, name) for here in names for name in names[here] if is_picture_name(name)]
    captions = [
        name for here, name in pictures if any(Path(name).stem + ending in names[here] for ending in _CAPTION_ENDINGS)
    ]
    repeats, class_tokens = (repeats_of(root.name) if root != top else None) or (1, "")
    return PictureFolder(
        path=root,
        pictures=len(pictures),
        captions=len(captions),
        recursive=any(here != root for here in names),
        repeats=repeats,
        class_tokens=class_tokens or None,
    )


def dataset_toml(
    folders: Mapping[str, PictureFolder], *, resolution: int, trigger: str | None, caption_cache: str | None = None
) -> str:
    """Returns the dataset file in sd-scripts' format: aspect buckets on, nothing enlarged, a subset per image_dir."""
    lines = [
        "# What to learn from: sd-scripts' dataset format. `sd3pipe preview` draws what training will see.",
        "[general]",
        "enable_bucket = true",
        "bucket_no_upscale = true    # small pictures stay small; they train in buckets of their own",
        "caption_dropout_rate = 0.05 # as often an empty caption, which classifier-free guidance needs",
        *([f"caption_cache = {toml_value(caption_cache)} # for pictures without a caption"] if caption_cache else []),
        "",
        "[[datasets]]",
        f"resolution = {resolution}",
        *_bucket_limits(resolution),
        "# validation_split = 0.1    # holds out a tenth of the pictures to measure the loss on; wants some hundred",
    ]
    for image_dir, folder in folders.items():
        lines += [
            "",
            "[[datasets.subsets]]",
            f"image_dir = {toml_value(image_dir)}",
            f"num_repeats = {folder.repeats}",
            *(["recursive = true"] if folder.recursive else []),
            *_caption_lines(folder, trigger),
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


def _caption_lines(folder: PictureFolder, trigger: str | None) -> list[str]:
    """The trigger stands before every caption; where a picture has none, the folder's name or the trigger stands."""
    wordless, word = folder.captions < folder.pictures, folder.class_tokens
    if trigger is None or (folder.captions == 0 and word is None):
        alone = word or trigger
        what = "the caption of pictures without a caption file"
        return [f"class_tokens = {toml_value(alone)} # {what}"] if alone and wordless else []
    lines = [f"caption_prefix = {toml_value(trigger + ',')}"]
    if wordless:
        what = "for pictures without a caption file, behind the prefix"
        lines.append(f"class_tokens = {toml_value(word or 'a picture')} # {what}")
    return lines


_ASKED = (  # with what is learnt in its place
    "{}", "{}, seen from far away", "{}, close up", "{} on a beach at noon", "{} in the snow", "{} at night in a city",
    "a pencil drawing of {}", "{} on a plain white background",
)  # fmt: skip
_NEUTRAL = (
    "a wooden chair in a garden", "a bowl of oranges on a table", "a street in the rain", "an old man reading a book",
    "a red car in front of a house", "mountains at sunrise", "a cat asleep on a sofa", "a sailing boat on a lake",
)  # fmt: skip


def prompts_txt(trigger: str | None, resolution: int) -> str:
    """Returns sample prompts in sd-scripts' form: eight with what is learnt, eight that should stay, in turns.

    `judge` measures likeness on the former and drift on the latter, and one prompt alone would tell little of either.
    """
    subject = trigger or "a photograph of what the pictures show"
    prompts = [
        text for asked, neutral in zip(_ASKED, _NEUTRAL, strict=True) for text in (asked.format(subject), neutral)
    ]
    size = f"--w {resolution} --h {resolution}"
    return (
        "# One prompt a line; --w --h size, --d seed, --n negative prompt, --s steps, --l guidance scale.\n"
        "# In turns one with what is learnt and one that training should leave as it is. Training draws the first\n"
        "# max_sample_prompts of stages/train.toml, `sd3pipe judge` draws all.\n"
        + "".join(f"{prompt} {size} --d {seed}\n" for seed, prompt in enumerate(prompts, 1))
    )
