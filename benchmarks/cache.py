"""Rates, sizes and opening times of the cache, beside one .npz and one .safetensors file per picture, in one run.

    python benchmarks/cache.py [--rows 600] [--folder DIR] [--no-op 1000 10000 100000] [--out FILE]

The .npz files are what sd-scripts writes: float32, latents without variance, text as CLIP-L and CLIP-G side by side.
Rates are medians of rounds in which all formats take turns. "Cold" means dropped from the page cache file by file, by
wall time; "warm" reads wait for nothing, so they are timed by CPU time, which other programs disturb less. "Bytes
alone" is one read of a row's bytes from an open segment: what lies between it and "unchecked" is our own work. The
"nothing to do" times are those of `sd3pipe encode-latents` on so many pictures (small ones: size does not matter where
the stat is remembered), whose cache was filled before with rows of the right shape and no model.
"""

import argparse
import datetime
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd3pipe.cache.index import Index
from sd3pipe.cache.manifest import Manifest
from sd3pipe.cache.plan import WantedRow, plan_leaves
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.samples import hash_array, sample_arrays
from sd3pipe.cache.store import fill_cache
from sd3pipe.cache.wanted import Wanted
from sd3pipe.fingerprint import hash_bytes

ROUNDS = 5
Read = Callable[[int], object]


@dataclass(frozen=True)
class Shape:
    """What one row holds in our cache (type and shape), and what sd-scripts stores for it (float32)."""

    name: str
    ours: dict[str, tuple[str, tuple[int, ...]]]
    theirs: dict[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        items = {"F16": 2, "BF16": 2, "U8": 1}
        return sum(int(np.prod(shape)) * items[dtype] for dtype, shape in self.ours.values())


LATENTS = {"latents_128x128": (16, 128, 128)}
SHAPES = (
    Shape("moments", {"moments": ("F16", (32, 128, 128))}, LATENTS),
    Shape("mean", {"mean": ("F16", (16, 128, 128))}, LATENTS),
    Shape(
        "text",
        {
            "clip_l": ("BF16", (77, 768)),
            "clip_g": ("BF16", (77, 1280)),
            "t5xxl": ("BF16", (256, 4096)),
            "pooled_l": ("BF16", (768,)),
            "pooled_g": ("BF16", (1280,)),
            "mask_l": ("U8", (77,)),
            "mask_g": ("U8", (77,)),
            "mask_t5": ("U8", (256,)),
        },
        {
            "lg_out": (77, 2048),
            "t5_out": (256, 4096),
            "lg_pooled": (2048,),
            "clip_l_attn_mask": (77,),
            "clip_g_attn_mask": (77,),
            "t5_attn_mask": (256,),
        },
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--folder", type=Path, help="where some GB lie during the run; default: a temporary folder")
    parser.add_argument("--no-op", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, help="also write what is printed to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"open": measure_opening, "fill": fill_without_model}[arguments.child[0]](Path(arguments.child[1]))
        return
    folder, lines = Path(tempfile.mkdtemp(prefix="cache-benchmark-", dir=arguments.folder)), []
    try:
        for line in report(arguments.rows, arguments.no_op, folder):
            print(line, flush=True)
            lines.append(line)
    finally:
        shutil.rmtree(folder)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(rows: int, no_op_counts: list[int], folder: Path) -> Iterator[str]:
    import torch

    torch.set_num_threads(1)
    yield f"# Cache benchmark, {datetime.datetime.now(datetime.UTC).date().isoformat()}"
    yield ""
    yield f"{platform.node()}: {cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, load"
    yield f"average {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch"
    yield f"{torch.__version__}, numpy {np.__version__}; {rows} rows each, median of {ROUNDS} rounds, one thread."
    yield ""
    yield "| rows | format | bytes/row | of npz | write, rows/s | cold, rows/s | warm, per CPU s | x npz, cold | warm |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for shape in SHAPES:
        yield from rates(shape, rows, folder / shape.name)
        shutil.rmtree(folder / shape.name)
    yield ""
    yield from file_counts()
    yield ""
    yield "Nothing to do (`sd3pipe encode-latents` as a process, warm):"
    for count in no_op_counts:
        yield no_op(count, folder / f"no-op-{count}")
    yield ""
    yield opening(folder / "million", 1_000_000)


def rates(shape: Shape, rows: int, folder: Path) -> Iterator[str]:
    """Yields one table line per format."""
    seconds: dict[str, float] = {}
    readers: dict[str, Read] = {}
    for name, write in {"npz": write_npz, "safetensors": write_safetensors, "cache": write_cache}.items():
        start = time.perf_counter()
        readers |= write(shape, rows, folder / name)
        os.sync()
        seconds[name] = time.perf_counter() - start
    cold: dict[str, list[float]] = {name: [] for name in readers}
    warm: dict[str, list[float]] = {name: [] for name in readers}
    order = list(range(rows))
    for number in range(ROUNDS):
        random.Random(number).shuffle(order)
        for name, read in readers.items():
            drop_from_page_cache(folder / name.split(",")[0])
            cold[name].append(rows_per_second(read, order, time.perf_counter))
            warm[name].append(rows_per_second(read, order, time.process_time))
    sizes = {name: folder_bytes(folder / name.split(",")[0]) / rows for name in readers}
    medians = {name: (statistics.median(cold[name]), statistics.median(warm[name])) for name in readers}
    for name, (cold_rate, warm_rate) in medians.items():
        yield (
            f"| {shape.name} | {name} | {sizes[name]:,.0f} | {sizes[name] / sizes['npz']:.1%} | "
            f"{rows / seconds[name.split(',')[0]]:,.0f} | {cold_rate:,.0f} | {warm_rate:,.0f} | "
            f"{cold_rate / medians['npz'][0]:.1f} | {warm_rate / medians['npz'][1]:.1f} |"
        )


def rows_per_second(read: Read, order: list[int], clock: Callable[[], float]) -> float:
    start = clock()
    for number in order:
        read(number)
    return len(order) / (clock() - start)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def random_tensors(shape: Shape):
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
    return {
        name: torch.ones(size, dtype=torch.uint8) if dtype == "U8" else torch.randn(size).to(types[dtype])
        for name, (dtype, size) in shape.ours.items()
    }


def write_npz(shape: Shape, rows: int, folder: Path) -> dict[str, Read]:
    import torch

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(size, dtype=np.float32) for name, size in shape.theirs.items()}
    for number in range(rows):
        np.savez(folder / f"{number}.npz", **arrays)

    def read(number: int) -> object:
        with np.load(folder / f"{number}.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    return {"npz": read}


def write_safetensors(shape: Shape, rows: int, folder: Path) -> dict[str, Read]:
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    tensors = random_tensors(shape)
    for number in range(rows):
        save_file(tensors, folder / f"{number}.safetensors")
    # load_file maps the file: a clone is what reads it
    return {
        "safetensors": lambda number: {
            name: tensor.clone() for name, tensor in load_file(folder / f"{number}.safetensors").items()
        }
    }


def write_cache(shape: Shape, rows: int, folder: Path) -> dict[str, Read]:
    from sd3pipe.cache.tensors import from_torch, to_torch

    row = {name: from_torch(tensor) for name, tensor in random_tensors(shape).items()}
    fill_cache(folder, wanted_rows(shape, rows), lambda keys: ((key, row) for key in keys), made_with="benchmark")
    plain, checked = (CacheReader(folder, verify_reads=policy) for policy in ("never", "always"))
    places = plain.index.arrays
    handles = [os.open(folder / "segments" / f"{name}.safetensors", os.O_RDONLY) for name in plain.index.plan_ids()]

    def read_bytes(number: int) -> object:
        data = np.empty(places["row_bytes"][number], np.uint8)
        os.preadv(handles[places["row_segment"][number]], [data], int(places["row_offset"][number]))
        return data

    return {
        "cache, bytes alone": read_bytes,
        "cache, unchecked": lambda number: {name: to_torch(item) for name, item in plain.row(number).items()},
        "cache, digests checked": lambda number: {name: to_torch(item) for name, item in checked.row(number).items()},
    }


def wanted_rows(shape: Shape, count: int) -> Wanted:
    """Returns what is wanted in a latents cache of so many rows; what the rows hold does not matter to the store."""
    hashes = [hash_bytes(str(number).encode()) for number in range(count)]
    recipe, about = {"shape": shape.name}, {"recipe_version": 1, "fingerprints": {"vae": "0"}}
    return Wanted(
        kind="latents",
        recipe=recipe,
        rows=[WantedRow(source=item, recipe=recipe, group="1024x1024", nbytes=shape.nbytes) for item in hashes],
        samples=latent_samples(hashes, range(count)),
        subsets={"photos": {"num_repeats": 1}},
        **about,
    )


def latent_samples(hashes: list[str], keys: Sequence[object]) -> dict[str, Sequence[object]]:
    count = len(keys)
    return {
        "name": [f"{number:07}.jpg" for number in range(count)],
        "subset": ["photos"] * count,
        "image_hash": hashes,
        **{name: [1024] * count for name in ("bucket_h", "bucket_w", "original_h", "original_w")},
        **{name: [0] * count for name in ("crop", "flip")},
        "split": ["train"] * count,
        "key": keys,
    }


def file_counts() -> Iterator[str]:
    """Yields how many files 10,000 rows make."""
    yield "Files per 10,000 rows (one file per picture: 10,000):"
    yield ""
    for shape in SHAPES:
        keys = [hash_bytes(str(number).encode()) for number in range(10_000)]
        leaves = plan_leaves("latents", [(key, "1024x1024", shape.nbytes) for key in keys])
        megabytes = 10_000 / len(leaves) * shape.nbytes / 1e6
        yield f"- {shape.name}: {len(leaves)} segments of {megabytes:.0f} MB on average, some 50 files of the index"


def no_op(count: int, folder: Path) -> str:
    """Returns a line about `sd3pipe encode-latents` on a dataset that is encoded already."""
    make_project(count, folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, __file__, "--child", "fill", folder], check=True, capture_output=True)
    command = [sys.executable, "-m", "sd3pipe", *encode_arguments(folder)]
    walls, before = [], os.times()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        walls.append(time.perf_counter() - start)
        assert f"{count} reused, 0 encoded" in result.stdout, result.stdout
    after = os.times()
    cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / ROUNDS
    shutil.rmtree(folder)
    wall = f"{statistics.median(walls):.2f} s of wall time (best {min(walls):.2f} s)"
    return f"- {count:,} pictures: {wall}, {cpu:.2f} s of CPU time"


def make_project(count: int, folder: Path) -> None:
    from PIL import Image

    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from support.tiny_base import write_tiny_base

    photos = folder / "photos"
    photos.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    picture = (folder / "one.png").read_bytes()
    for number in range(count):  # decoders stop at the end of the picture, so what follows makes each file another one
        (photos / f"{number:07}.png").write_bytes(picture + str(number).encode())
    (folder / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\nbucket_reso_steps = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos}'\nnum_repeats = 1\n",
        encoding="utf-8",
    )
    base = write_tiny_base(folder / "base")
    (folder / "base.txt").write_text(str(base.model), encoding="utf-8")


def encode_arguments(folder: Path) -> list[str]:
    return [
        "encode-latents",
        f"--model={(folder / 'base.txt').read_text(encoding='utf-8')}",
        f"--dataset={folder / 'dataset.toml'}",
        f"--out={folder / 'caches' / 'latents'}",
    ]


def fill_without_model(folder: Path) -> None:
    """Runs encode-latents with an encoder that yields rows of the right shape at once."""
    from sd3pipe import cli
    from sd3pipe.cache.rows import Tensor
    from sd3pipe.encoding import latent_rows

    row = {"moments": Tensor("F16", (32, 8, 8), bytes(32 * 8 * 8 * 2))}
    latent_rows.encoded_rows = lambda keys, *_: ((key, row) for key in keys)
    sys.exit(cli.run(encode_arguments(folder)))


def opening(folder: Path, rows: int) -> str:
    """Returns a line about opening a cache of so many rows, whose segments are only pretended."""
    write_pretended_cache(folder, rows)
    result = subprocess.run(
        [sys.executable, __file__, "--child", "open", folder], check=True, capture_output=True, text=True
    )
    seconds, megabytes, before, lookup = map(float, result.stdout.split())
    size = folder_bytes(folder) / 1e6
    return (
        f"Opening {rows:,} rows (index of {size:.0f} MB, its hash checked): {seconds:.2f} s, peak memory of process "
        f"{megabytes:.0f} MB ({before:.0f} MB before opening); finding a row by its key: {lookup * 1e6:.0f} us"
    )


def measure_opening(folder: Path) -> None:
    before = peak_megabytes()
    start = time.perf_counter()
    reader = CacheReader(folder)
    seconds = time.perf_counter() - start
    megabytes = peak_megabytes()
    keys = [reader.keys[number].tobytes().hex() for number in range(0, len(reader), max(1, len(reader) // 1000))]
    start = time.perf_counter()
    for key in keys:
        reader.number(key)
    print(seconds, megabytes, before, (time.perf_counter() - start) / len(keys))


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage counts what was before exec, too
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def write_pretended_cache(folder: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    segments = -(-rows // 45)  # a leaf of 64 rows is 70 % full on average
    keys = np.sort(generator.integers(0, 256, (rows, 32), np.uint8).view("S32").reshape(-1)).view(np.uint8)
    keys = keys.reshape(rows, 32)
    hexes = [key.tobytes().hex() for key in keys]
    arrays = {
        "row_key": keys,
        "row_segment": (np.arange(rows) % segments).astype(np.uint32),
        "row_offset": (np.arange(rows) // segments * (1 << 20) + 4096).astype(np.uint64),
        "row_bytes": np.full(rows, 1 << 20, np.uint64),
        "row_layout": np.zeros(rows, np.uint32),
        "row_digest": generator.integers(0, 256, (rows, 32), np.uint8),
        "segment_id": np.sort(hash_array([hash_bytes(str(number).encode()) for number in range(segments)]), axis=0),
        "segment_bytes": np.full(segments, 45 << 20, np.uint64),
        "layouts": np.frombuffer(b'[[["moments","F16",[32,128,128]]]]', np.uint8),
        **sample_arrays("latents", latent_samples(hexes, hexes), keys),
    }
    index = Index("latents", arrays)
    index.write(folder / "index" / f"{index.digest()}.zarr")
    manifest = Manifest(
        kind="latents",
        recipe={},
        recipe_version=1,
        fingerprints={},
        subsets={},
        quarantined=(),
        rows=rows,
        samples=rows,
        index=index.digest(),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
