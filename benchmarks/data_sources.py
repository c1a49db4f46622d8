"""What it takes to scan, check and decode the same pictures as files, in tars and in Parquet files.

python benchmarks/data_sources.py --pictures 100000 --files 100
"""

import argparse
import io
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.decoding import row_job
from sd3pipe.data.feed import decoded_rows
from sd3pipe.data.geometry import views_of_all
from sd3pipe.data.read_ahead import read_ahead
from sd3pipe.data.scan import scan, watched_folders
from sd3pipe.file_stamps import FileStamps
from sd3pipe.watched import state_of

_DRAWN = 64


def pictures(count: int, px: int) -> Iterator[tuple[str, bytes]]:
    """Yields names and JPEGs, each other bytes than all others by a comment in its header."""
    drawn = []
    for seed in range(_DRAWN):
        coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        drawn.append(file.getvalue())
    for number in range(count):
        data = drawn[number % _DRAWN]
        yield f"{number:06d}.jpg", data[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + data[2:]


def write(folder: Path, form: str, count: int, files: int, px: int) -> Path:
    """Writes the pictures with captions in one form and returns the image_dir."""
    place = folder / form
    place.mkdir()
    batch: list[tuple[str, bytes]] = []
    for number, item in enumerate(pictures(count, px), start=1):
        if form == "folder":
            (place / item[0]).write_bytes(item[1])
            (place / item[0]).with_suffix(".txt").write_text(f"picture {item[0]}")
            continue
        batch.append(item)
        if len(batch) == count // files:
            (_write_tar if form == "tars" else _write_parquet)(place / f"{number:06d}", batch)
            batch = []
    return place


def _write_tar(stem: Path, batch: list[tuple[str, bytes]]) -> None:
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for name, data in batch:
            for member_name, content in ((name, data), (f"{name[:-4]}.txt", f"picture {name}".encode())):
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_parquet(stem: Path, batch: list[tuple[str, bytes]]) -> None:
    import pyarrow
    from pyarrow import parquet

    image = pyarrow.array(
        [{"bytes": data, "path": name} for name, data in batch],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    table = pyarrow.table({"image": image, "text": [f"picture {name}" for name, _ in batch]})
    parquet.write_table(table, stem.with_suffix(".parquet"), row_group_size=100)


def measure(image_dir: Path, decode: int, workers: int) -> dict[str, float]:
    """Returns seconds of a first scan, of a second one and of the check of stats, and rows per second of the feed."""
    file = image_dir.parent / f"{image_dir.name}.toml"
    file.write_text(f"[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = '{image_dir}'\n")
    memory = image_dir.parent / f"{image_dir.name}.json"
    found = {}
    for name in ("first scan", "second scan"):
        started = time.perf_counter()
        stamps = FileStamps(memory)
        scanned = scan(load_dataset(file), stamps)
        stamps.save()
        found[name] = time.perf_counter() - started
    watched = watched_folders(load_dataset(file), captions=True)
    assert watched is not None
    started = time.perf_counter()
    state_of(file, watched)
    found["check"] = time.perf_counter() - started
    views = [view for of_one in views_of_all(scanned, crop_variants=1, seed=0)[0] for view in of_one]
    views.sort(key=lambda view: view.picture.image_hash)  # the order of a cache's rows, which is random
    views = views[:decode]
    ahead = read_ahead([view.picture.place for view in views])
    jobs = (row_job(view.picture, view.cut, 8, data) for view, data in zip(views, ahead, strict=True))
    rows = decoded_rows(jobs, workers=workers)
    next(rows)  # once the workers are there
    started = time.perf_counter()
    found["rows/s"] = sum(1 for _ in rows) / (time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--decode", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--forms", nargs="+", default=["folder", "tars", "parquet"])
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for form in given.forms:
            image_dir = write(Path(folder), form, given.pictures, given.files, given.px)
            size = sum(path.stat().st_size for path in image_dir.iterdir())
            found = measure(image_dir, given.decode, given.workers)
            print(
                f"{form:8} {size / 1e9:5.2f} GB  " + "  ".join(f"{name} {value:.2f}" for name, value in found.items())
            )


if __name__ == "__main__":
    main()
