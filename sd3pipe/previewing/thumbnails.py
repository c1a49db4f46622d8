"""Decoded pictures of earlier previews, kept by what they were made from: a second preview decodes what is new."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sd3pipe.data.decoding import DecodeJob, Pixels
from sd3pipe.data.feed import Decoded, decoded_rows
from sd3pipe.data.geometry import RECIPE_VERSION
from sd3pipe.documents import DocumentError, read_data
from sd3pipe.files import write_bytes
from sd3pipe.fingerprint import hash_json

_DAMAGE = (DocumentError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class Thumbnails:
    """A folder of them. It keeps those of the jobs that were last drawn and no others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def drawn(self, jobs: Sequence[DecodeJob], *, workers: int) -> Iterator[Decoded]:
        """Yields the pixels of each job in order. Raises StorageError."""
        made_of = ([RECIPE_VERSION, job.image_hash, job.mask_hash, job.cut.recipe(), job.latent_px] for job in jobs)
        files = [self._folder / f"{hash_json(its)}.npz" for its in made_of]
        kept = {file: pixels for file, job in zip(files, jobs, strict=True) if (pixels := _read(file, job)) is not None}
        for other in set(self._folder.glob("*.npz")) - set(files):
            other.unlink(missing_ok=True)
        missing = [job for file, job in zip(files, jobs, strict=True) if file not in kept]
        made = decoded_rows(missing, workers=workers) if missing else iter(())
        for file in files:
            if file in kept:
                yield kept[file]
                continue
            pixels = next(made)
            if isinstance(pixels, Pixels):
                buffer = io.BytesIO()
                mask = {} if pixels.mask is None else {"mask": pixels.mask}
                np.savez(buffer, allow_pickle=False, rgb=pixels.rgb, **mask)
                write_bytes(file, buffer.getvalue())
            yield pixels


def _read(file: Path, job: DecodeJob) -> Pixels | None:
    """Returns what was kept for a job; None where nothing was, or it is damaged."""
    try:
        with np.load(io.BytesIO(read_data(file)), allow_pickle=False) as arrays:
            rgb, mask = arrays["rgb"], arrays["mask"] if job.cut.mask else None
    except _DAMAGE:
        return None
    size = job.cut.size[::-1]
    fits = rgb.dtype == np.uint8 and rgb.shape == (*size, 3)
    fits_mask = mask is None or (mask.dtype == np.float16 and mask.shape == size)
    return Pixels(rgb=rgb, mask=mask) if fits and fits_mask else None
