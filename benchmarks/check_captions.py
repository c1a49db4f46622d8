"""How well `check-captions` finds exchanged captions on the demo base, and how often it names one that is right.

    python benchmarks/check_captions.py --seeds 30

Of 24 drawings that the base knows, with captions in all wordings, two captions that differ in at least two of shape,
colour, size and background are exchanged, or none. For some seeds a twelfth picture of noise is tried as well.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sd3pipe.commands import check_captions, encode_latents, encode_text
from sd3pipe.console import setup_logging
from sd3pipe.demo.base_files import MODEL, T5_LENGTH, TOKENIZERS
from sd3pipe.demo.drawings import WORDINGS, Subject, all_subjects, draw
from sd3pipe.params.check_captions import CheckCaptionsParams
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams

FIELDS = ("shape", "colour", "size", "background")
DATASET = """\
[general]
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
resolution = 64
min_bucket_reso = 64
max_bucket_reso = 64
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = "pictures"
"""


def main() -> None:
    """Prints, for each seed and over all, which pictures were named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--with-noise", type=int, default=5, help="of the seeds, the first ones")
    options = parser.parse_args()
    setup_logging()
    logging.getLogger("sd3pipe").setLevel(logging.WARNING)
    found = named = right = noise = 0
    seeds = range(options.first, options.first + options.seeds)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            exchanged, lowest, claimed = exchanged_captions(Path(folder), seed)
            clean = checked(Path(folder), exchange=False, seed=seed)
            with_noise = seed - options.first < options.with_noise
            noise += with_noise and noise_named(Path(folder), seed)
        found += set(exchanged) <= set(lowest[:3])
        right += set(exchanged) == set(claimed)
        named += bool(clean["suspects"])
        print(
            f"seed {seed}: exchanged {exchanged}, lowest {lowest}, named {claimed}; clean {clean['suspects']}",
            flush=True,
        )
    total = len(seeds)
    print(f"both among the first three in {found} of {total}, just these named in {right}")
    tried = min(total, options.with_noise)
    print(f"with none exchanged, one is named in {named} of {total}; a picture of noise is named in {noise} of {tried}")


def exchanged_captions(folder: Path, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Returns the exchanged pictures, those of the four lowest advantages, and those that were named."""
    content = checked(folder, exchange=True, seed=seed)
    by_advantage = sorted(content["pictures"], key=lambda item: item["advantage"]["value"])
    first, second = pair(subjects_of(seed, 24))
    named = [name.partition("/")[2] for name in content["suspects"]]
    return [f"{first:02d}.png", f"{second:02d}.png"], [item["name"] for item in by_advantage[:4]], named


def noise_named(folder: Path, seed: int) -> bool:
    """Returns whether a picture of noise among twelve is named."""
    content = checked(folder, exchange=False, seed=seed, count=12, noise=True)
    return content["suspects"] == ["pictures/11.png"]


def checked(folder: Path, *, exchange: bool, seed: int, count: int = 24, noise: bool = False) -> dict:
    """Returns what check-captions says of drawings."""
    generator = np.random.default_rng(seed)
    subjects = subjects_of(seed, count)
    captions = [subject.caption(number % len(WORDINGS)) for number, subject in enumerate(subjects)]
    if exchange:
        first, second = pair(subjects)
        captions[first], captions[second] = captions[second], captions[first]
    place = folder / f"{exchange}-{count}-{noise}"
    (place / "pictures").mkdir(parents=True)
    for number, (subject, caption) in enumerate(zip(subjects, captions, strict=True)):
        picture = draw(subject, height=64, width=64, generator=generator)
        if noise and number == count - 1:
            picture = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"pictures/{number:02d}.png")
        (place / f"pictures/{number:02d}.txt").write_text(caption)
    (place / "dataset.toml").write_text(DATASET)
    text, latents, out = folder / "caches/text", folder / "caches/latents", place / "check.json"
    common = {"model": str(MODEL), "threads": 1}
    encode_text.main(
        EncodeTextParams(
            dataset=place / "dataset.toml", out=text, tokenizers=TOKENIZERS, t5xxl_max_token_length=T5_LENGTH, **common
        )
    )
    decoding = {"max_data_loader_n_workers": 0}  # a process more takes longer to start than these take to decode
    encode_latents.main(EncodeLatentsParams(dataset=place / "dataset.toml", out=latents, **decoding, **common))
    check_captions.main(CheckCaptionsParams(text=text, latents=latents, out=out, caption_batch_size=10, **common))
    return json.loads(out.read_text())


def subjects_of(seed: int, count: int) -> list[Subject]:
    subjects = all_subjects()
    return [subjects[i] for i in np.random.default_rng([seed, 1]).choice(len(subjects), count, replace=False)]


def pair(subjects: list[Subject]) -> tuple[int, int]:
    """Returns the first two pictures whose subjects differ in at least two of the four words."""
    return next(
        (i, j)
        for i in range(len(subjects))
        for j in range(i + 1, len(subjects))
        if sum(getattr(subjects[i], name) != getattr(subjects[j], name) for name in FIELDS) >= 2
    )


if __name__ == "__main__":
    main()
