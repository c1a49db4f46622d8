"""Does the demo's LoRA learn the new shape as well from a model's captions as from the true ones?

    python benchmarks/caption_training.py [--captioner DIR] [--draws 400] [--steps N] [--folder DIR]

Trains the demo twice: with the captions that its drawings have, and with those that the tiny captioner of
scripts/make_demo_captioner.py writes beside them, whose words for known shapes `--replace` turns into the new word.
Both adapters then draw the same prompts from the same noise, and the demo's measure reads the shapes. The test is
McNemar's, exact and one-sided, on the pairs of which one is right.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support.demo_pictures import draw_latents, encode_subjects, read_latents

from sd3pipe.demo.drawings import NEW_WORD, OUTLINES, all_subjects
from sd3pipe.demo.project import LEARNT, write_files
from sd3pipe.files import make_folder, write_bytes
from sd3pipe.params.demo import DemoParams

ROOT = Path(__file__).resolve().parent.parent

_FIRST_SEED = 5000


def main() -> None:
    """Prints what the model said of the drawings, and how many pictures show the new shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", type=Path, help="folder of a trained one; without it one is trained")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--steps", type=int, default=DemoParams.model_fields["steps"].default, help="of both trainings")
    parser.add_argument("--folder", type=Path, help="where all is kept; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        captioner = (options.captioner or trained_captioner(folder / "captioner")).resolve()
        true, made = (project(folder / name, options.steps) for name in ("true", "captioned"))
        tell_captions(made, caption(made, captioner))
        right = [shapes_drawn(folder, here, options.draws) for here in (true, made)]
    pairs = list(zip(*right, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    print(f"the new shape in {sum(right[0])} of {len(pairs)} with true captions, {sum(right[1])} with the model's")
    print(f"only with the true ones {lost}, only with the model's {won}, p = {chance(lost, won):.3f}")


def trained_captioner(folder: Path) -> Path:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_captioner.py", "--out", folder], check=True)
    return folder


def project(folder: Path, steps: int) -> Path:
    """Writes the demo's project, unless it is there."""
    for path, content in write_files(folder, steps=steps).items():
        if not path.exists():
            write_bytes(make_folder(path.parent) / path.name, content)
    return folder


def caption(here: Path, captioner: Path) -> dict[str, str]:
    """Lets the model caption the drawings of the new shape afresh; returns their true captions by name."""
    texts = {file.name: file.read_text() for file in sorted((here / "pictures").glob("*.txt"))}
    if (here / "caches").exists():
        return texts  # was run before
    rules = [word for shape in OUTLINES for word in ("--replace", f"{shape}={NEW_WORD}")]
    sd3pipe(
        here, "caption", "--images", "pictures", "--captioner", captioner, "--write", "all", "--yes", *rules,
        "--captioner-dtype", "float32", "--max-new-tokens", 16, "--device", "cpu",
    )  # fmt: skip
    return texts


def tell_captions(here: Path, true: dict[str, str]) -> None:
    for name, text in true.items():
        print(f"{name}: {text} -> {(here / 'pictures' / name).read_text().strip()}")


def shapes_drawn(folder: Path, here: Path, draws: int) -> list[bool]:
    """Trains a project, and returns for each draw whether it shows the new shape."""
    sd3pipe(here, "run")
    unseen = [subject for subject in all_subjects((NEW_WORD,)) if subject not in LEARNT]
    subjects = [unseen[number % len(unseen)] for number in range(draws)]
    with tempfile.TemporaryDirectory(dir=folder) as prompts:
        encoded = encode_subjects(Path(prompts) / "prompts", subjects, _FIRST_SEED)
    readings = read_latents(draw_latents(encoded, here / f"exports/{NEW_WORD}.safetensors"))
    return [reading.shape == NEW_WORD for reading in readings]


def sd3pipe(here: Path, *words: object) -> None:
    subprocess.run([sys.executable, "-m", "sd3pipe", *map(str, words)], cwd=here, check=True, capture_output=True)


def chance(lost: int, won: int) -> float:
    """Returns the chance of so few or fewer pairs for the second if either wins a pair with one half."""
    return sum(math.comb(lost + won, number) for number in range(won + 1)) / 2 ** (lost + won)


if __name__ == "__main__":
    main()
