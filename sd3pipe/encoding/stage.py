"""What the encode stages have in common around their rows: forecast, shards, Ray, report, note of sources.

What differs stands in the commands: which rows there are and who makes them.
"""

import abc
import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sd3pipe.cache.folder import MANIFEST
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.staleness import remember_sources, sources_seen
from sd3pipe.cache.store import NO_PART, EncodedRows, FillCounts, fill_cache, missing_rows
from sd3pipe.cache.wanted import Wanted
from sd3pipe.console import StageReport, count, listed, one_line, readable_bytes, readable_seconds, say, version
from sd3pipe.data.dataset_file import Dataset, load_dataset
from sd3pipe.data.scan import Scan, UnreadableFile, scan, source_files
from sd3pipe.encoding.ray_engine import fill_parts
from sd3pipe.encoding.repetition import Repetition, overheard
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_file
from sd3pipe.params.caption import CaptionParams
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.stage import shard_of_process

log = logging.getLogger(__name__)

EncodeParams = TypeVar("EncodeParams", CaptionParams, EncodeLatentsParams, EncodeTextParams)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRead:
    """A dataset as its files were when they were read; `sources` is what to note of them beside a cache."""

    dataset: Dataset
    found: Scan
    sources: dict[str, Any]


def read_dataset(file: Path, stamps: FileStamps, *, captions: bool) -> DatasetRead:
    """Returns a dataset with its pictures, with their captions or without. Raises InputError, ParameterError."""
    read = {file: hash_file(file)} if file.is_file() else {}  # before it is read: it may change meanwhile
    dataset = load_dataset(file)
    for remark in dataset.remarks:
        log.info("%s: %s", dataset.path, remark)
    started = time.time()
    lists = [subset.metadata_file for subset in dataset.subsets if subset.metadata_file]
    read |= {path: hash_file(path) for path in lists if path.is_file()}
    found = scan(dataset, stamps, with_captions=captions)
    for line in found.left_out:
        log.warning("%s", line)
    seen = source_files(found, dataset, captions=captions)
    sources = sources_seen(
        dataset_file=dataset.path,
        files={**seen.files, **read},
        folders=seen.folders,
        trees=seen.trees,
        remote=seen.remote,
        scan_started=started,
        stamps=stamps,
    )
    return DatasetRead(dataset=dataset, found=found, sources=sources)


def none_usable(dataset: Dataset, unreadable: Sequence[UnreadableFile]) -> InputError:
    """Returns the error that no picture of a dataset is left."""
    reasons = listed([f"{one_line(str(file.place))}: {file.reason}" for file in unreadable], separator="; ")
    return InputError(f"{dataset.path}: none of {count(len(unreadable), 'picture')} can be used: {reasons}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What some rows take to be made: about how long, and bytes beyond their nominal sizes."""

    device: str
    seconds: float
    more_bytes: int = 0
    meanwhile_bytes: int = 0  # beside the cache until the rows are made


@dataclass(frozen=True, kw_only=True)
class Encoding(abc.ABC):
    """The rows of one cache, known before anything is encoded; the stages add who makes them."""

    stage: ClassVar[str]
    parts_per_worker: ClassVar[int]  # of a Ray cluster

    out: Path
    wanted: Wanted
    read: DatasetRead | None  # whose changes make the cache stale

    @property
    @abc.abstractmethod
    def libraries(self) -> tuple[str, ...]:
        """Names of those whose versions are recorded beside each row."""

    def remark(self) -> str:
        """Returns what a forecast says of the dataset, too."""
        return ""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns what the report says of the dataset."""

    def show(self) -> None:
        """Shows in a dry run what there is to see beside the forecast."""
        return

    def ending(self, counts: FillCounts) -> tuple[dict[str, Any], str]:
        """Does what is left once the rows are made; returns what report and summary line say behind the counts."""
        return {}, ""

    def check(self, counts: FillCounts) -> None:
        """Raises QuarantineError where the published cache lacks more than the options allow."""
        return

    def look_at(self, keys: Sequence[str]) -> object:
        """Says what is to be known of rows that are about to be made."""
        return None

    @abc.abstractmethod
    def encode(self, keys: Sequence[str]) -> EncodedRows:
        """Yields rows in the order of their keys; the first call loads the encoders."""

    @abc.abstractmethod
    def outlook(self, keys: Sequence[str]) -> Outlook:
        """Returns what it takes to make some rows."""


def run(
    params: EncodeParams,
    prepare: Callable[[EncodeParams], Encoding],
    *,
    stage: str,
    out: Path,
    inputs: Mapping[str, str | None],
    repetition: Callable[[], Repetition] | None,
) -> None:
    """Fills a cache, or this process's shard of it, and reports what it took; with --dry-run only says what it would.

    `prepare` makes the same encoding in the workers of a Ray cluster, and has to survive pickling. `repetition` is what
    to compare the run with, if anything. Raises QuarantineError after publishing if too much is unreadable.
    """
    if params.dry_run:
        encoding = prepare(params)
        _tell_version_change(encoding)
        encoding.show()
        say(f"{stage}, dry run: {_forecast(encoding)}")
        return
    with StageReport(stage, path=Path(f"{out}.report.json"), inputs=inputs) as report:
        repeated = repetition() if repetition else None
        if repeated and repeated.tell(report):
            return
        with overheard() as said:
            encoding = prepare(params)
        facts = encoding.facts()
        report.update(**facts)
        _tell_version_change(encoding)
        if params.engine == "ray":
            counts = _fill_on_ray(encoding, params, prepare, report.begin)
        else:
            counts = _fill_part(encoding, shard_of_process(params.shard), report.begin, retry_unreadable=params.rehash)
        report.begin()
        report.update(**counts.as_report())
        if encoding.read is not None:
            remember_sources(encoding.out, encoding.read.sources)
        found, remark = encoding.ending(counts)
        report.update(**found)
        report.summary = counts.summary() + remark
        encoding.check(counts)
        if repeated:
            repeated.note(encoding.wanted, counts, {**facts, **found}, remark, said)


def _fill_part(
    encoding: Encoding,
    shard: tuple[int, int],
    begin: Callable[[], None] = lambda: None,
    *,
    retry_unreadable: bool = False,
) -> FillCounts:
    """Fills part i of n; `begin` is called when the first row is made."""

    def encode(keys: Sequence[str]) -> EncodedRows:
        for item in encoding.encode(keys):
            begin()
            yield item

    made_with = [f"{name} {importlib.metadata.version(name)}" for name in encoding.libraries]
    return fill_cache(
        encoding.out,
        encoding.wanted,
        encode,
        made_with=", ".join([f"sd3pipe {version()}", *made_with]),
        shard=shard,
        retry_unreadable=retry_unreadable,
    )


def _fill_on_ray(
    encoding: Encoding, params: EncodeParams, prepare: Callable[[EncodeParams], Encoding], begin: Callable[[], None]
) -> FillCounts:
    """Lets the workers of a cluster make what is missing, and publishes it."""
    if params.rehash:
        _fill_part(encoding, NO_PART, begin, retry_unreadable=True)  # forgets which rows were unreadable
    missing = missing_rows(encoding.out, encoding.wanted)
    if missing.keys:
        encoding.look_at(missing.keys)
        begin()
        done = {name: False for name in ("rehash", "verify_weights") if name in type(params).model_fields}
        fill_parts(
            encoding.stage,
            functools.partial(_part_filler, prepare, params.model_copy(update=done)),
            parts_per_worker=encoding.parts_per_worker,
            workers=params.ray_workers,
            on_cpu=params.device == "cpu",
        )
    return _fill_part(encoding, (0, 1), begin).since(missing)


def _part_filler(
    prepare: Callable[[EncodeParams], Encoding], params: EncodeParams
) -> Callable[[tuple[int, int]], FillCounts]:
    """Returns what fills any part in a worker, with encoders that are loaded once."""
    return functools.partial(_fill_part, prepare(params))


def _tell_version_change(encoding: Encoding) -> None:
    """Says before anything is encoded what another recipe version takes."""
    manifest = read_manifest(encoding.out / MANIFEST)
    if manifest is not None and manifest.recipe_version != encoding.wanted.recipe_version:
        log.warning(
            "%s was encoded by version %d of its recipe, this sd3pipe has version %d, which makes its rows anew (train "
            "takes the cache as it is, too): %s",
            encoding.out,
            manifest.recipe_version,
            encoding.wanted.recipe_version,
            _forecast(encoding),
        )


def _forecast(encoding: Encoding) -> str:
    """Returns what a run would do: rows, time on this device, size."""
    missing = missing_rows(encoding.out, encoding.wanted)
    there = len(encoding.wanted.row_by_key) - len(missing.keys)
    if not missing.keys:
        return f"nothing to encode, {count(there, 'row')} there{encoding.remark()}"
    ahead = encoding.outlook(missing.keys)
    meanwhile = f"{readable_bytes(ahead.meanwhile_bytes)} more meanwhile, " if ahead.meanwhile_bytes else ""
    return (
        f"{count(len(missing.keys), 'row')} to encode, {there} there{encoding.remark()}; about "
        f"{readable_seconds(ahead.seconds)} on {ahead.device}, {readable_bytes(missing.nbytes + ahead.more_bytes)} to "
        f"write, {meanwhile}{readable_bytes(missing.free_bytes)} free"
    )
