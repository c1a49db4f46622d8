"""The parts of encode_latents.py. Apart from it, because spawned workers import the script that was started."""

import argparse
import os
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sd3pipe.cache.store import FillCounts, fill_cache
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.decoding import row_job
from sd3pipe.data.feed import decoded_rows
from sd3pipe.data.geometry import views_of_all
from sd3pipe.data.scan import scan
from sd3pipe.encoding.latent_plan import latents_wanted
from sd3pipe.encoding.latent_rows import rows_of
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.latent_encoding import LatentEncoder
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_architecture import VAEArchitecture


class Pooling(nn.Module):
    """Stands for a VAE that takes no time: the mean over 8 x 8 pixels in 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.architecture = VAEArchitecture()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = nn.functional.avg_pool2d(pixels_BCHW, 8).repeat(1, 6, 1, 1)[:, :16]
        return pooled, pooled


class Clock:
    """Wall seconds and CPU seconds of this process and its finished children."""

    def __enter__(self) -> "Clock":
        self.wall, self.cpu = time.perf_counter(), self._cpu()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, self._cpu() - self.cpu

    @staticmethod
    def _cpu() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes JPEGs that differ, made from a photograph so that they decode as photographs do."""
    from skimage import data

    folder.mkdir()
    photograph = np.asarray(Image.fromarray(data.astronaut()).resize(size, Image.Resampling.BICUBIC))
    for number in range(count):
        Image.fromarray(np.roll(photograph, number * 7, axis=1)).save(folder / f"{number:04d}.jpg", quality=90)


def run_stage(folder: Path, name: str, resolution: int, encoder: LatentEncoder, workers: int) -> FillCounts:
    """Fills a cache of its own from the pictures in a folder, as encode-latents does."""
    file = folder / "d.toml"
    file.write_text(
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\n[[datasets.subsets]]\nimage_dir = 'pics'\n"
    )
    dataset = load_dataset(file)
    pictures, _ = views_of_all(scan(dataset, FileStamps(folder / f"{name}.stat.json")), crop_variants=1, seed=0)
    views = [view for of_picture in pictures for view in of_picture]
    recipe = {"latent_mode": "moments", "latent_dtype": "float16", "vae_dtype": "float32"}
    wanted = latents_wanted(views, [], dataset, VAEArchitecture(), "0" * 64, recipe)
    by_key = dict(zip(wanted.keys, views, strict=True))

    def encode(keys):
        asked = [by_key[key] for key in keys]
        decoded = decoded_rows((row_job(view.picture, view.cut, 8) for view in asked), workers=workers)
        yield from zip(keys, rows_of(asked, decoded, encoder), strict=True)

    return fill_cache(folder / name / "latents", wanted, encode, made_with="benchmark")


def vae_alone(pictures: Sequence[np.ndarray], encoder: LatentEncoder) -> None:
    """Encodes pictures that are decoded already, and keeps nothing."""
    for start in range(0, len(pictures), encoder.batch_size):
        batch = pictures[start : start + encoder.batch_size]
        list(encoder.finish(encoder.start(batch), [""] * len(batch)))


def show(name: str, pictures: int, clock: Clock) -> None:
    print(f"| {name} | {pictures} | {pictures / clock.wall:.2f} | {1000 * clock.cpu / pictures:.1f} |", flush=True)


def main() -> None:
    """Runs and prints everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--feed-pictures", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print("| what | pictures | pictures/s | CPU ms per picture |\n|---|---|---|---|", flush=True)
    verdicts = []
    with tempfile.TemporaryDirectory() as temporary:
        if options.feed_pictures:
            verdicts.append(measure_feed(Path(temporary) / "feed", options))
        if options.pictures:
            verdicts.append(compare(Path(temporary) / "vae", options))
    print("\n" + "\n".join(verdicts))


def measure_feed(folder: Path, options: argparse.Namespace) -> str:
    """Prints each round of the feed; returns the best rate in words."""
    folder.mkdir()
    write_photographs(folder / "pics", options.feed_pictures, (1024, 768))
    pooling = LatentEncoder(Pooling(), batch_size=options.batch, mode="moments", stored_as=torch.float16)
    rates = []
    for number in range(options.rounds):
        with Clock() as clock:
            run_stage(folder, f"latents-{number}", 512, pooling, options.workers)
        show("feed, start of the workers included", options.feed_pictures, clock)
        rates.append(options.feed_pictures / clock.wall)
    return f"Feeding rate: {max(rates):.0f} pictures/s of wall time at best (aim: at least 100)."


def compare(folder: Path, options: argparse.Namespace) -> str:
    """Prints the VAE alone and the stage in turns; returns in words what the stage adds."""
    folder.mkdir()
    write_photographs(folder / "pics", options.pictures, (256, 256))
    pictures = [np.asarray(Image.open(path)) for path in sorted((folder / "pics").iterdir())]
    torch.manual_seed(0)
    vae = VAE(VAEArchitecture()).eval().requires_grad_(False)
    encoder = LatentEncoder(vae, batch_size=options.batch, mode="moments", stored_as=torch.float16)
    encoder.start(pictures[:1])  # warm up
    wall, cpu = [], []
    for number in range(options.rounds):
        with Clock() as alone:
            vae_alone(pictures, encoder)
        show("VAE alone, 256 px", options.pictures, alone)
        with Clock() as stage:
            run_stage(folder, f"latents-{number}", 256, encoder, options.workers)
        show("stage, 256 px", options.pictures, stage)
        wall.append((stage.wall, alone.wall))
        cpu.append((stage.cpu, alone.cpu))
    return (
        f"The stage adds {added(wall):+.1%} wall time and {added(cpu):+.1%} CPU time to the VAE alone, quickest rounds "
        "compared (aim: at most 5 %)."
    )


def added(pairs: Sequence[tuple[float, float]]) -> float:
    """Returns by which share the quickest stage takes longer than the quickest VAE alone."""
    return min(stage for stage, _ in pairs) / min(alone for _, alone in pairs) - 1
