"""`sd3pipe encode-latents`: pictures to VAE latents, one row per picture, crop and flip, in a cache."""

import functools
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3pipe.cache.folder import MANIFEST, machine_folder
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.rows import Row
from sd3pipe.cache.staleness import remember_sources
from sd3pipe.cache.store import NO_PART, FillCounts, Unreadable, fill_cache, missing_rows
from sd3pipe.cache.wanted import Wanted
from sd3pipe.console import StageReport, count, one_line, progress, readable_bytes, readable_seconds, say, version
from sd3pipe.data.buckets import cut_by_limit
from sd3pipe.data.dataset_file import Dataset, load_dataset
from sd3pipe.data.scan import Scan, scan, source_files, tell_about_pictures
from sd3pipe.encoding.latent_plan import Sources, find_sources, latents_wanted
from sd3pipe.encoding.recipe_version import version_change
from sd3pipe.errors import InputError, QuarantineError
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.vae_architecture import VAEArchitecture, detect_vae
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.sharing import shard_of_process
from sd3pipe.stat_memory import StatMemory

if TYPE_CHECKING:
    from sd3pipe.models.latent_encoding import LatentEncoder

log = logging.getLogger(__name__)

_SHOWN = 5  # how many unreadable pictures an error names
_PARTS_PER_WORKER = 4  # of a Ray cluster: small enough that none waits long for the last


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Everything that is known before anything is encoded."""

    dataset: Dataset
    found: Scan
    scan_started: float
    sources: Sources
    vae: ComponentSource
    architecture: VAEArchitecture
    wanted: Wanted


def main(params: EncodeLatentsParams) -> None:
    """Fills the latents cache of a dataset. Raises QuarantineError after publishing if too much is unreadable."""
    if params.dry_run:
        ready = _prepare(params)
        _tell_version_change(ready, params)
        say(f"encode-latents, dry run: {_forecast(ready, params)}")
        return
    inputs = {"dataset": str(params.dataset), "model": params.model, "vae": str(params.vae) if params.vae else None}
    with StageReport("encode-latents", path=Path(f"{params.out}.report.json"), inputs=inputs) as report:
        ready = _prepare(params)
        report.update(**_picture_report(ready.sources))
        _tell_version_change(ready, params)
        if params.engine == "ray":
            counts = _fill_on_ray(ready, params, report.begin)
        else:
            counts = _filler(ready, params, report.begin)(shard_of_process(params.shard))
        report.begin()
        report.update(**counts.as_report())
        seen = source_files(ready.found, ready.dataset, captions=False)
        remember_sources(
            params.out,
            dataset_file=params.dataset,
            files=seen.files,
            folders=seen.folders,
            scan_started=ready.scan_started,
        )
        report.summary = counts.summary() + _below_resolution(ready.sources)
        _check_quarantine(counts, ready.sources, params)


def filler(params: EncodeLatentsParams) -> Callable[[tuple[int, int]], FillCounts]:
    """Returns what fills part i of n of the cache, for as many parts as it is asked to, with one VAE."""
    return _filler(_prepare(params), params, lambda: None)


def _filler(
    ready: _Prepared, params: EncodeLatentsParams, begin: Callable[[], None]
) -> Callable[[tuple[int, int]], FillCounts]:
    encode = _encoder(ready, params, begin)

    def fill(shard: tuple[int, int]) -> FillCounts:
        return fill_cache(
            params.out,
            ready.wanted,
            encode,
            made_with=f"sd3pipe {version()}, torch {importlib.metadata.version('torch')}",
            shard=shard,
            retry_unreadable=params.rehash,
        )

    return fill


def _fill_on_ray(ready: _Prepared, params: EncodeLatentsParams, begin: Callable[[], None]) -> FillCounts:
    """Lets the workers of a cluster make what is missing, and publishes it."""
    if params.rehash:
        _filler(ready, params, begin)(NO_PART)  # forgets which rows were unreadable
    theirs = params.model_copy(update={"rehash": False})
    missing = missing_rows(params.out, ready.wanted)
    if missing.keys:
        from sd3pipe.encoding.ray_engine import fill_parts

        begin()
        fill_parts(
            "encode-latents",
            functools.partial(filler, theirs),
            parts_per_worker=_PARTS_PER_WORKER,
            workers=params.ray_workers,
            on_cpu=params.device == "cpu",
        )
    return _filler(ready, theirs, begin)((0, 1)).since(missing)


def _prepare(params: EncodeLatentsParams) -> _Prepared:
    """Reads the dataset and the headers of pictures and VAE. Raises InputError if no picture can be used."""
    dataset = load_dataset(params.dataset)
    for remark in dataset.remarks:
        log.info("%s: %s", dataset.path, remark)
    memory = StatMemory(machine_folder(params.out) / "stat.json", trust=not params.rehash)
    scan_started = time.time()
    found = scan(dataset, memory, with_captions=False)
    tell_about_pictures(found)
    sources = find_sources(found, crop_variants=params.crop_variants, seed=params.seed)
    if not sources.samples:
        reasons = "; ".join(f"{one_line(str(item.path))}: {item.reason}" for item in sources.left_out[:_SHOWN])
        raise InputError(f"{params.dataset}: none of {count(sources.pictures, 'picture')} can be used: {reasons}")
    vae = find_component("vae", model=params.model, file=params.vae)
    architecture = detect_vae(vae.shapes(), vae.where)
    recipe = {name: getattr(params, name) for name in ("latent_mode", "latent_dtype", "vae_dtype")}
    wanted = latents_wanted(sources, dataset, architecture, vae.fingerprint(memory), recipe)
    if not params.dry_run:
        memory.save()
    return _Prepared(
        dataset=dataset,
        found=found,
        scan_started=scan_started,
        sources=sources,
        vae=vae,
        architecture=architecture,
        wanted=wanted,
    )


def _encoder(
    ready: _Prepared, params: EncodeLatentsParams, begin: Callable[[], None]
) -> Callable[[Sequence[str]], Iterator[tuple[str, Row | Unreadable]]]:
    """Returns the function that encodes rows by their keys; with its first call torch and the VAE are loaded."""
    sample_by_key = dict(zip(ready.wanted.keys, ready.sources.samples, strict=True))

    @functools.cache
    def encoder() -> "LatentEncoder":
        from sd3pipe.encoding.latent_rows import load_encoder

        return load_encoder(ready.vae, params)

    def encode(keys: Sequence[str]) -> Iterator[tuple[str, Row | Unreadable]]:
        from sd3pipe.encoding.latent_rows import encoded_rows  # imports torch, which a run without work never needs

        samples = [sample_by_key[key] for key in keys]
        with progress("encode-latents", len(keys), "rows") as bar:
            for key, row in encoded_rows(keys, samples, encoder(), ready.architecture, params):
                begin()
                bar.advance()
                yield key, row

    return encode


def _picture_report(sources: Sources) -> dict[str, Any]:
    """Returns what the report says about the pictures."""
    sizes = Counter(sample.view.cut.size for sample in sources.samples)
    splits = Counter(sample.picture.split for sample in sources.samples)
    return {
        "pictures": sources.pictures,
        "buckets": {f"{width}x{height}": rows for (width, height), rows in sorted(sizes.items())},
        "train_rows": splits["train"],
        "validation_rows": splits["validation"],
    }


def _below_resolution(sources: Sources) -> str:
    """Returns words about rows that max_bucket_reso makes much smaller than the resolution, if there are any."""
    small = [item for item in sources.samples if cut_by_limit(item.view.cut.size, item.picture.subset.bucketing)]
    if not small:
        return ""
    width, height = Counter(sample.view.cut.size for sample in small).most_common(1)[0][0]
    bucketing = small[0].picture.subset.bucketing
    return (
        f", {count(len(small), 'row')} smaller than the resolution ({width} x {height} instead of the area of "
        f"{bucketing.width} x {bucketing.height}: max_bucket_reso = {bucketing.max_bucket_reso} cuts the longer side)"
    )


def _tell_version_change(ready: _Prepared, params: EncodeLatentsParams) -> None:
    """Says before anything is encoded what another recipe version takes."""
    words = version_change(params.out, ready.wanted)
    if words:
        log.warning("%s: %s", words, _forecast(ready, params))


def _forecast(ready: _Prepared, params: EncodeLatentsParams) -> str:
    """Returns what a run would do: rows, time on this device, size."""
    missing = missing_rows(params.out, ready.wanted)
    there = len(ready.wanted.row_by_key) - len(missing.keys)
    left_out = f"{len(ready.sources.left_out)} of {count(ready.sources.pictures, 'picture')} left out"
    if not missing.keys:
        return f"nothing to encode, {count(there, 'row')} there, {left_out}"
    from sd3pipe.encoding.latent_rows import device_speed  # imports torch, only to tell the time

    cut_by_key = {key: sample.view.cut for key, sample in zip(ready.wanted.keys, ready.sources.samples, strict=True)}
    pixels = sum(cut_by_key[key].size[0] * cut_by_key[key].size[1] for key in missing.keys)
    device, pixels_per_second = device_speed(ready.architecture, params)
    return (
        f"{count(len(missing.keys), 'row')} to encode, {there} there, {left_out}; about "
        f"{readable_seconds(pixels / pixels_per_second)} on {device}, {readable_bytes(missing.nbytes)} to write, "
        f"{readable_bytes(missing.free_bytes)} free"
    )


def _check_quarantine(counts: FillCounts, sources: Sources, params: EncodeLatentsParams) -> None:
    """Raises QuarantineError if more pictures are unreadable than allowed; the good rows are published by now."""
    limit = params.quarantine_limit(sources.pictures)
    if counts.quarantined <= limit:
        return
    manifest = read_manifest(params.out / MANIFEST)
    names = ", ".join(one_line(entry["name"]) for entry in manifest.quarantined[:_SHOWN]) if manifest else ""
    allowed = "--strict allows none" if params.strict else f"--max-quarantined allows {limit}"
    raise QuarantineError(
        f"{params.out}: {counts.quarantined} of {count(sources.pictures, 'picture')} unreadable, {allowed}: {names}"
        f"{', ...' if counts.quarantined > _SHOWN else ''}: repair or remove them (their reasons stand in "
        f"{params.out / MANIFEST}); the others are encoded"
    )
