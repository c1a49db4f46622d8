"""The part of encode-latents that needs torch and Pillow: decoded pictures through the VAE to rows."""

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sd3pipe.cache.rows import Row, from_numpy
from sd3pipe.cache.tensors import from_torch
from sd3pipe.console import one_line
from sd3pipe.data.decoding import Pixels, row_job
from sd3pipe.data.feed import Decoded, decoded_rows, default_workers
from sd3pipe.data.geometry import View
from sd3pipe.data.read_ahead import read_ahead
from sd3pipe.device import choose_device
from sd3pipe.device_memory import memory_errors
from sd3pipe.errors import UnreadablePicture
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.latent_encoding import LatentEncoder, encoder_speed
from sd3pipe.models.sources import ComponentSource
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.tensors.formats import DTYPES

log = logging.getLogger(__name__)

Encoded = Row | UnreadablePicture
_Batch = list[tuple[str, Decoded]]  # path and pixels of rows of one size, the unreadable ones between the others


def load_encoder(source: ComponentSource, params: EncodeLatentsParams) -> LatentEncoder:
    """Returns the VAE on its device, with what is fixed for a whole run."""
    device = choose_device(params.device, params.threads)
    return LatentEncoder(
        load_vae(source, dtype=DTYPES[params.vae_dtype], device=device),
        batch_size=params.vae_batch_size,
        mode=params.latent_mode,
        stored_as=DTYPES[params.latent_dtype],
    )


def encoded_rows(
    keys: Sequence[str],
    views: Sequence[View],
    encoder: LatentEncoder,
    architecture: VAEArchitecture,
    params: EncodeLatentsParams,
) -> Iterator[tuple[str, Encoded]]:
    """Yields (key, row) of every view in order. Raises InputError where the VAE's numbers do not fit the rows."""
    pictures = read_ahead([view.picture.place for view in views])
    jobs = (row_job(v.picture, v.cut, architecture.downscale, data) for v, data in zip(views, pictures, strict=True))
    workers = default_workers() if params.max_data_loader_n_workers is None else params.max_data_loader_n_workers
    with memory_errors(lambda: _way_out(params, encoder.device)):
        rows = rows_of(views, decoded_rows(jobs, workers=min(workers, len(keys))), encoder)
        yield from zip(keys, rows, strict=True)


def rows_of(views: Sequence[View], decoded: Iterable[Decoded], encoder: LatentEncoder) -> Iterator[Encoded]:
    """Yields rows in order; each batch is read back after the next one has been started."""
    waiting = None
    for batch in _batches(views, decoded, encoder.batch_size):
        pictures = [item.rgb for _, item in batch if isinstance(item, Pixels)]
        started = encoder.start(pictures) if pictures else None
        if waiting is not None:
            yield from _finished(*waiting, encoder)
        waiting = (batch, started)
    if waiting is not None:
        yield from _finished(*waiting, encoder)


def device_speed(architecture: VAEArchitecture, params: EncodeLatentsParams) -> tuple[str, float]:
    """Returns the device's name and about how many pixels per second it encodes."""
    device = choose_device(params.device, params.threads)
    return str(device), encoder_speed(architecture, device, DTYPES[params.vae_dtype])


def _way_out(params: EncodeLatentsParams, device: torch.device) -> str:
    steps = [f"--vae-batch-size {params.vae_batch_size // 2}"] if params.vae_batch_size > 1 else []
    steps += ["--device cpu"] if device.type == "cuda" else []
    return f"pass {' or '.join(steps)}" if steps else "free some of it, or lower --max-data-loader-n-workers"


def _batches(views: Sequence[View], decoded: Iterable[Decoded], batch_size: int) -> Iterator[_Batch]:
    """Yields runs of rows of equal size with `batch_size` readable ones at the most."""
    batch: _Batch = []
    size, readable = None, 0
    for view, item in zip(views, decoded, strict=True):
        if batch and (view.cut.size != size or readable == batch_size):
            yield batch
            batch, readable = [], 0
        size = view.cut.size
        batch.append((one_line(str(view.picture.place)), item))
        readable += isinstance(item, Pixels)
    if batch:
        yield batch


def _finished(batch: _Batch, started: Tensor | None, encoder: LatentEncoder) -> Iterator[Encoded]:
    names = [path for path, item in batch if isinstance(item, Pixels)]
    rows = encoder.finish(started, names) if started is not None else iter(())
    for path, item in batch:
        if isinstance(item, UnreadablePicture):
            log.warning("%s: left out: %s", path, item)
            yield item
            continue
        row = {encoder.mode: from_torch(next(rows))}
        if item.mask is not None:
            row["mask"] = from_numpy(item.mask)
            if not item.mask.any():
                log.warning("%s: its mask leaves nothing of it to learn from", path)
        yield row
