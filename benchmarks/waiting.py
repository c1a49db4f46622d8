"""What a user waits for before anything new is done, each beside its floor, of one or of two checkouts in turns.

    python benchmarks/waiting.py [--pictures 100000] [--rounds 3] [--beside CHECKOUT] [--only NAME...] [--folder DIR]

CPU seconds (user and system, of the command and its children), median of the rounds; the machine may be a busy one.
The dataset is of tiny PNG files, each with a caption of its own; its caches are filled with rows of the right shape by
encoders that take no time. `--beside` names another checkout of sd3pipe that is measured on the same files in turns,
on caches of its own; `--folder` keeps the files for the next run.

nothing to do   encode stages and caption, all done before; the floor lists the folder and asks for every file's stat
train's start   a run of one step on all pictures; the floor is the same run on few
cache why       on one picture; the floor is `sd3pipe cache ls`
first step      a run of one step on 500 pictures; the floor is `import torch`
preview         2,000 pictures, done before; the floor lists the folder and asks for every file's stat
photograph      a JPEG of 12 megapixels to its bucket, in CPU milliseconds; the floor is libjpeg-turbo's decoding
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FEW = 500
PREVIEWED = 2_000

Measure = Callable[[Path, Path], float]  # takes checkout and folder, returns CPU seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout of sd3pipe")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="those whose names begin so")
    parser.add_argument("--folder", type=Path, help="where files are made and kept; default: a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"fill": fill, "photograph": photograph}[options.child[0]](*map(Path, options.child[1:]))
        return
    checkouts = [path.resolve() for path in (options.beside, ROOT) if path]
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="waiting-"))).resolve()
    try:
        print(f"load average {os.getloadavg()[0]:.1f}, {options.rounds} rounds, {options.pictures:,} pictures")
        for line in report(checkouts, folder, options.pictures, options.rounds, options.only):
            print(line, flush=True)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def report(checkouts: list[Path], folder: Path, pictures: int, rounds: int, only: list[str]) -> Iterator[str]:
    for name, (size, floor, measures) in cases(pictures).items():
        if only and not name.startswith(tuple(only)):
            continue
        project = folder / str(size)
        make_project(project, size)
        for checkout in checkouts:
            fill_caches(checkout, project)
        seconds: list[list[float]] = [[] for _ in (floor, *checkouts)]
        for number in range(rounds + 1):  # the first one only warms up
            one = [floor(ROOT, project), *(sum(measure(path, project) for measure in measures) for path in checkouts)]
            for place, value in enumerate(one if number else ()):
                seconds[place].append(value)
        yield line_of(name, [statistics.median(values) for values in seconds])


def cases(pictures: int) -> dict[str, tuple[int, Measure, tuple[Measure, ...]]]:
    """Returns number of pictures, floor and what is measured, by name."""
    return {
        "nothing to do, latents": (pictures, stats(".png"), (encode("latents"),)),
        "nothing to do, text": (pictures, stats(".png", ".txt"), (encode("text"),)),
        "nothing to do, captions": (pictures, stats(".png", ".txt"), (encode("captions"),)),
        "train's start": (pictures, small(train_once), (train_once,)),
        "cache why": (pictures, command("cache", "ls", "{caches}/latents"), (cache_why,)),
        "first step": (FEW, python("import torch"), (train_once,)),
        "preview": (
            PREVIEWED,
            stats(".png", ".txt"),
            (command("preview", "--dataset", "{dataset}", "--out", "{out}"),),
        ),
        "photograph": (FEW, decoder_alone, (photograph_alone,)),
    }


def line_of(name: str, medians: list[float]) -> str:
    floor, *measured = (f"{1000 * value:,.0f} ms" if name == "photograph" else f"{value:.2f} s" for value in medians)
    ratio = f", {medians[1] / medians[2]:.2f} x" if len(measured) > 1 else ""
    return f"{name}: {' -> '.join(measured)}{ratio}; floor {floor}"


def cpu_seconds(checkout: Path, *arguments: object) -> float:
    """Returns the CPU seconds that Python took with these arguments and a checkout's package."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment(checkout), cwd="/"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise RuntimeError(f"{checkout}: {arguments}: {result.stdout}{result.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment(checkout: Path) -> dict[str, str]:
    """Returns what a user has, compiled modules included, with one thread."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def caches(checkout: Path, project: Path) -> Path:
    return project / f"caches-{checkout.name}"


def command(*words: str) -> Measure:
    """Returns a measure of `sd3pipe` with these words; {caches}, {dataset} and {out} stand for paths."""

    def measure(checkout: Path, project: Path) -> float:
        places = {
            "caches": caches(checkout, project),
            "dataset": project / "dataset.toml",
            "out": project / f"out-{checkout.name}",
        }
        return cpu_seconds(checkout, "-m", "sd3pipe", *(word.format(**places) for word in words))

    return measure


def python(program: str) -> Measure:
    return lambda checkout, _: cpu_seconds(checkout, "-c", program)


def stats(*endings: str) -> Measure:
    """Returns a measure of listing the dataset's folder and asking for the stat of each of its files, in C."""

    def measure(_: Path, project: Path) -> float:
        start = time.process_time()
        with os.scandir(project / "photos") as entries:
            for entry in entries:
                if entry.name.endswith(endings):
                    entry.stat()
        return time.process_time() - start

    return measure


def encode_arguments(kind: str, checkout: Path, project: Path) -> list[str]:
    base = project.parent / "base"
    if kind == "captions":
        return [
            "caption",
            *("--captioner", str(base / "captioner")),
            *("--dataset", str(project / "dataset.toml")),
            *("--out", str(caches(checkout, project) / kind)),
            *("--write", "none"),
        ]
    text = ["--tokenizers", str(base / "tokenizers"), "--t5xxl-max-token-length", "8"] if kind == "text" else []
    return [
        f"encode-{kind}",
        *("--model", str(next(base.glob("*.safetensors")))),
        *("--dataset", str(project / "dataset.toml")),
        *("--out", str(caches(checkout, project) / kind)),
        *text,
    ]


def encode(kind: str) -> Measure:
    return lambda checkout, project: cpu_seconds(checkout, "-m", "sd3pipe", *encode_arguments(kind, checkout, project))


def train_once(checkout: Path, project: Path) -> float:
    out, here = project / f"run-{checkout.name}-{os.getpid()}", caches(checkout, project)
    model = next((project.parent / "base").glob("*.safetensors"))
    paths = ["--model", model, "--text", here / "text", "--latents", here / "latents", "--out", out]
    return cpu_seconds(
        checkout, "-m", "sd3pipe", "train", *paths, "--max-train-steps", 1, "--network-dim", 4, "--resume", "never"
    )


def small(measure: Measure) -> Measure:
    """Returns the measure of a dataset of few pictures in the place of another one."""

    def measured(checkout: Path, project: Path) -> float:
        few = project.parent / str(FEW)
        make_project(few, FEW)
        fill_caches(checkout, few)
        return measure(checkout, few)

    return measured


def cache_why(checkout: Path, project: Path) -> float:
    return command("cache", "why", "{caches}/latents", f"{0:07}.png")(checkout, project)


def make_project(project: Path, count: int) -> None:
    """Writes dataset and base model, unless they are there."""
    from PIL import Image

    sys.path.append(str(ROOT / "tests"))
    from support.tiny_base import write_tiny_base
    from support.tiny_captioners import blip

    if not (project.parent / "base").exists():
        write_tiny_base(project.parent / "base")
        blip(project.parent / "base" / "captioner")
    if (project / "dataset.toml").exists():
        return
    photos = project / "photos"
    photos.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(project / "one.png")
    picture = (project / "one.png").read_bytes()
    for number in range(count):  # decoders stop at the end of the picture, so what follows makes each file another one
        (photos / f"{number:07}.png").write_bytes(picture + str(number).encode())
        (photos / f"{number:07}.txt").write_text(f"a photograph of a harbour in the morning, number {number}, calm sea")
    (project / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\nbucket_reso_steps = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos}'\nnum_repeats = 1\n",
        encoding="utf-8",
    )


def fill_caches(checkout: Path, project: Path) -> None:
    """Fills the caches of a checkout, unless they are there."""
    if (caches(checkout, project) / "text" / "manifest.json").exists():
        return
    time.sleep(2.1)  # files that were written a moment ago are not trusted by their stat
    for kind in ("latents", "text", "captions"):
        cpu_seconds(checkout, __file__, "--child", "fill", kind, checkout, project)


def fill(kind: Path, checkout: Path, project: Path) -> None:
    """Runs a stage whose encoder makes one row, and takes it for all; no picture looks like another."""
    import numpy as np

    from sd3pipe import cli
    from sd3pipe.cache.rows import Tensor
    from sd3pipe.captioning import caption_rows
    from sd3pipe.data import looks
    from sd3pipe.encoding import latent_rows, text_encoding

    def look(picture: Any) -> dict[str, np.ndarray]:
        digest = np.frombuffer(bytes.fromhex(picture.image_hash), np.uint8)[None]
        bits = {"bits": digest.view(np.uint64), "mirrored": digest.view(np.uint64)}
        return {"hash": digest, **bits, "colours": np.zeros((1, 4, 4, 3), np.uint8), "blur": np.zeros(1, np.float32)}

    words = {"caption": Tensor("U8", (9,), b"a harbour")}
    caption_rows.load_captioner = lambda *_: None
    caption_rows.captioned_rows = lambda pictures, *_: (words for _ in pictures)
    looks._row = look

    counts: list[int] = []
    tokenized, encoded_texts = text_encoding.tokenized, text_encoding.encoded_texts

    def first_tokenized(texts: Sequence[str], *about: Any):
        counts.append(len(texts))
        return tokenized(texts[:1], *about)

    def first_encoded(*about: Any) -> Iterator[object]:
        row = next(encoded_texts(*about))
        yield from (row for _ in range(counts[-1]))

    latents = {"moments": Tensor("F16", (32, 8, 8), bytes(32 * 8 * 8 * 2))}
    latent_rows.encoded_rows = lambda keys, *_: ((key, latents) for key in keys)
    text_encoding.tokenized, text_encoding.encoded_texts = first_tokenized, first_encoded
    sys.exit(cli.run(encode_arguments(str(kind), checkout, project)))


def decoder_alone(checkout: Path, project: Path) -> float:
    """Returns the CPU seconds in which libjpeg-turbo decodes the photograph, called by simplejpeg."""
    import simplejpeg

    data = photograph_file(project).read_bytes()
    return quickest(lambda: simplejpeg.decode_jpeg(data, "RGB"))


def photograph_alone(checkout: Path, project: Path) -> float:
    """Returns the CPU seconds of a checkout for the photograph, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", "photograph", str(photograph_file(project))],
        capture_output=True, text=True, env=environment(checkout), check=True,
    )  # fmt: skip
    return float(done.stdout)


def photograph(file: Path) -> None:
    """Prints the CPU seconds of one row of the photograph: read, hashed, decoded and resized."""
    from sd3pipe.data.cut import Cut
    from sd3pipe.data.decoding import decode_row, row_job
    from sd3pipe.data.places import Place
    from sd3pipe.fingerprint import hash_file

    cut = Cut(
        resized=(1173, 880),
        left=10,
        top=8,
        size=(1152, 864),
        flip=False,
        resize_filter="area",
        mask=None,
        background=None,
    )
    picture: Any = SimpleNamespace(place=Place(file), image_hash=hash_file(file), mask_place=None, mask_hash=None)
    job = row_job(picture, cut, latent_px=8)
    print(quickest(lambda: decode_row(job)))


def photograph_file(project: Path) -> Path:
    """Returns a JPEG of 4000 x 3000 pixels of smooth colours and noise, as a camera saves it."""
    import numpy as np
    from PIL import Image

    file = project / "photograph.jpg"
    if not file.exists():
        y, x = np.mgrid[0:3000, 0:4000].astype(np.float32)
        waves = np.stack([np.sin(x / 90 + y / 300), np.sin(y / 70), np.sin((x + y) / 50)], axis=-1)
        noisy = 127 + 90 * waves + np.random.default_rng(0).normal(0, 6, waves.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=92)
    return file


def quickest(work: Callable[[], object], times: int = 5) -> float:
    """Returns the CPU seconds of the quickest of some runs."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
