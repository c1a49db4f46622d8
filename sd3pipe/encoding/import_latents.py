"""Takes over the latents that sd-scripts cached beside the pictures, where they can be proved to be theirs.

Every row's file, time, size and geometry are checked; some rows are encoded again. If one of those is wrong, all are
refused, for the others are of the same origin; unless every row was encoded again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.rows import Row, from_numpy
from sd3pipe.cache.samples import select
from sd3pipe.cache.store import Unreadable, fill_cache
from sd3pipe.cache.tensors import from_torch
from sd3pipe.cache.wanted import Wanted
from sd3pipe.console import progress, version
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.decoding import decode_row
from sd3pipe.data.headers import UnreadablePicture
from sd3pipe.data.images import differs_from_plain
from sd3pipe.data.scan import scan
from sd3pipe.device import choose_device
from sd3pipe.encoding.agreement import check_latents
from sd3pipe.encoding.import_report import ImportReport, drawn_to_verify
from sd3pipe.encoding.latent_plan import Sample, find_sources, imported_latents_wanted
from sd3pipe.encoding.latent_rows import row_job
from sd3pipe.encoding.npz_files import NotProved, NpzFile, check_not_older
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.latent_encoding import DTYPES, LatentEncoder
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.vae_architecture import VAEArchitecture, detect_vae
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.stat_memory import StatMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Import:
    params: EncodeLatentsParams
    vae: ComponentSource
    architecture: VAEArchitecture
    wanted: Wanted
    samples: Mapping[str, Sample]  # by key
    twins: frozenset[Path]  # .npz files that two pictures would share


def import_latents(params: EncodeLatentsParams, out: Path, *, verify_rows: int) -> ImportReport:
    """Fills `out` with the rows that are proved, if there are any. Raises InputError for a model without a VAE."""
    dataset = load_dataset(params.dataset)
    memory = StatMemory(machine_folder(out) / "stat.json")
    sources = find_sources(
        scan(dataset, memory, with_captions=False), crop_variants=params.crop_variants, seed=params.seed
    )
    vae = find_component("vae", model=params.model, file=params.vae)
    architecture = detect_vae(vae.shapes(), vae.where)
    recipe = {name: getattr(params, name) for name in ("latent_mode", "latent_dtype", "vae_dtype")}
    wanted = imported_latents_wanted(sources, dataset, architecture, vae.fingerprint(memory), recipe)
    memory.save()
    files = Counter(npz_file(path, size) for path, size in {_identity(sample) for sample in sources.samples})
    job = _Import(
        params=params,
        vae=vae,
        architecture=architecture,
        wanted=wanted,
        samples=dict(zip(wanted.keys, sources.samples, strict=True)),
        twins=frozenset(file for file, pictures in files.items() if pictures > 1),
    )
    report = ImportReport(kind="latents")
    proved = _proved(job, report)
    proved = _verified(job, proved, verify_rows, report)
    if proved:
        counts = fill_cache(
            out, _only(wanted, set(proved)), lambda keys: _rows(job, keys), made_with=f"sd3pipe {version()}"
        )
        report.imported = len(proved) - counts.failed
    return report


def npz_file(picture: Path, size: tuple[int, int]) -> Path:
    """Returns where sd-scripts caches the latents of a picture of this width and height."""
    return picture.with_name(f"{picture.stem}_{size[0]:04d}x{size[1]:04d}_sd3.npz")


def _identity(sample: Sample) -> tuple[Path, tuple[int, int]]:
    return sample.picture.path, (sample.picture.width, sample.picture.height)


def _proved(job: _Import, report: ImportReport) -> list[str]:
    """Returns the rows that nothing speaks against as far as files, sizes and settings tell."""
    proved = []
    for key, sample in job.samples.items():
        try:
            _check_settings(sample, job.twins)
            _latents(job, sample)
        except (NotProved, UnreadablePicture) as error:
            report.refuse(_name(sample), str(error))
        else:
            proved.append(key)
    return proved


def _check_settings(sample: Sample, twins: frozenset[Path]) -> None:
    """Raises NotProved where sd-scripts would not have made this row, or where its file does not say."""
    picture, subset, file = sample.picture, sample.picture.subset, npz_file(*_identity(sample))
    if subset.random_crop or (subset.face_crop_aug_range and not subset.bucketing.enable_bucket):
        raise NotProved("random crops: the .npz does not say where it was cut")
    if sample.view.cut.background is not None:
        raise NotProved("transparency is laid over a colour here, and was not there")
    if file in twins:
        raise NotProved("two pictures share one .npz")
    check_not_older(file, [picture.path])
    difference = differs_from_plain(picture.path.read_bytes(), picture.path.suffix)
    if difference is not None:
        raise NotProved(difference)


def _latents(job: _Import, sample: Sample) -> Tensor:
    """Returns the unscaled latents [C, h, w] in the type of the rows. Raises NotProved."""
    picture, (width, height) = sample.picture, sample.view.cut.size
    npz = NpzFile(npz_file(*_identity(sample)))
    h, w = height // job.architecture.downscale, width // job.architecture.downscale
    suffix = f"_{h}x{w}"
    if npz.whole_numbers(f"original_size{suffix}", 2) != [picture.width, picture.height]:
        raise NotProved("it was made from a picture of another size")
    name = ("latents_flipped" if sample.view.flip else "latents") + suffix
    latents_Chw = torch.from_numpy(npz.numbers(name, (job.architecture.latent_channels, h, w))).float()
    stored = latents_Chw.to(DTYPES[job.params.latent_dtype])
    if not bool(torch.isfinite(stored).all()):
        raise NotProved(f"its latents are beyond {job.params.latent_dtype}")
    return stored


def _verified(job: _Import, proved: Sequence[str], number: int, report: ImportReport) -> list[str]:
    """Returns the rows that still count after some were encoded again: all, none, or those that were right."""
    if not proved:
        return []
    device = choose_device(job.params.device, job.params.threads)
    vae = load_vae(job.vae, dtype=DTYPES[job.params.vae_dtype], device=device)
    encoder = LatentEncoder(vae, batch_size=1, mode="moments", stored_as=torch.float32)
    drawn = drawn_to_verify(proved, number)
    wrong: dict[str, str] = {}
    with progress("from-kohya, encoding again", len(drawn), "rows") as bar:
        for key in drawn:
            try:
                report.off = max(report.off, _distance(job, job.samples[key], encoder))
            except (NotProved, UnreadablePicture) as error:
                wrong[key] = str(error)
            bar.advance()
    report.verified = len(drawn)
    return report.keep_right(proved, wrong, {key: _name(job.samples[key]) for key in proved}, checked=len(drawn))


def _distance(job: _Import, sample: Sample, encoder: LatentEncoder) -> float:
    pixels = decode_row(row_job(sample, job.architecture.downscale))
    (moments,) = encoder.finish(encoder.start([pixels.rgb]), [str(sample.picture.path)])
    mean_Chw, logvar_Chw = moments.chunk(2)
    return check_latents(_latents(job, sample).float(), mean_Chw, logvar_Chw).whole


def _rows(job: _Import, keys: Sequence[str]) -> Iterator[tuple[str, Row | Unreadable]]:
    """Yields the rows as they are stored."""
    for key in keys:
        try:
            yield key, _row(job, job.samples[key])
        except (NotProved, UnreadablePicture) as error:  # its files changed since they were checked
            yield key, Unreadable(str(error))


def _row(job: _Import, sample: Sample) -> Row:
    """Returns a row with its mask, which is made from the picture, as for rows of our own."""
    row = {"sample": from_torch(_latents(job, sample))}
    if sample.view.cut.mask is not None:
        mask = decode_row(row_job(sample, job.architecture.downscale)).mask
        assert mask is not None
        row["mask"] = from_numpy(mask)
    return row


def _only(wanted: Wanted, keys: set[str]) -> Wanted:
    """Returns what is wanted, cut down to some rows."""
    rows = [row for key, row in zip(wanted.keys, wanted.rows, strict=True) if key in keys]
    samples = select(wanted.samples, [key in keys for key in wanted.samples["key"]])
    return Wanted(
        kind=wanted.kind,
        recipe_version=wanted.recipe_version,
        fingerprints=wanted.fingerprints,
        recipe=wanted.recipe,
        rows=rows,
        samples=samples,
        subsets=wanted.subsets,
    )


def _name(sample: Sample) -> str:
    return sample.picture.name + (", mirrored" if sample.view.flip else "")
