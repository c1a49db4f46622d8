"""The one moment in which a cache changes for its readers: the swap of manifest.json."""

import contextlib
import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3pipe.cache.folder import CacheFolder, is_segment
from sd3pipe.cache.index import Index, build_row_arrays, header_table, read_index
from sd3pipe.cache.keys import Kind
from sd3pipe.cache.manifest import Manifest, read_manifest
from sd3pipe.cache.samples import hex_list, sample_arrays
from sd3pipe.cache.segment import SegmentHeader
from sd3pipe.cache.wanted import Readable, Wanted
from sd3pipe.cache.zarr_group import ReadFile
from sd3pipe.documents import MOST_LIST_BYTES, read_data
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_file, storage_errors, sync_folder
from sd3pipe.temporaries import remove_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """The segments of a plan: those that the old index knows by id, the others by their headers."""

    headers: Mapping[str, SegmentHeader]
    old: Index | None
    kept: frozenset[str]


def check_kind(folder: CacheFolder, kind: Kind) -> None:
    """Raises InputError if the folder holds a cache of another kind, or a manifest that cannot be understood."""
    manifest = read_manifest(folder.manifest)
    if manifest is not None and manifest.kind != kind:
        raise InputError(f"{folder.path} is a cache of {manifest.kind}, not of {kind}: choose another --out")


def load_published(folder: CacheFolder, kind: Kind) -> tuple[Manifest | None, Index | None]:
    """Returns what is published now. A damaged index is None: it is made again from the segments. Raises InputError."""
    check_kind(folder, kind)
    manifest = read_manifest(folder.manifest)
    if manifest is None:
        return None, None
    try:
        return manifest, open_index(folder, manifest)
    except InputError as error:
        log.warning("%s: the index is made again", error)
        return manifest, None


def open_index(folder: CacheFolder, manifest: Manifest) -> Index:
    """Returns the index that a manifest names, checked. Raises InputError."""
    path = folder.index(manifest.index)
    return read_index(manifest.kind, manifest.index, reader_of(path), str(path))


def reader_of(folder: Path) -> ReadFile:
    """Returns what reads the files of an index's folder."""
    return lambda name: read_data(folder / name, most_bytes=MOST_LIST_BYTES)


def publish(folder: CacheFolder, wanted: Wanted, readable: Readable, holdings: Holdings, scratch: Path) -> None:
    """Makes index and manifest say what the plan's segments hold, then moves away what they do not need.

    Files that are already right are not touched. Raises StorageError.
    """
    index = build_index(wanted.kind, readable, holdings)
    assert hex_list(index.arrays["row_key"]) == sorted(readable.keys), (
        "the plan's segments hold other rows than planned"
    )
    digest = index.digest()
    manifest = Manifest(
        kind=wanted.kind,
        recipe=wanted.recipe,
        recipe_version=wanted.recipe_version,
        fingerprints=wanted.fingerprints,
        subsets=wanted.subsets,
        quarantined=readable.quarantined,
        rows=len(index),
        samples=len(index.samples),
        index=digest,
        extra=wanted.extra,
    )
    trusted = holdings.old is not None and holdings.old.digest() == digest
    _write_index(folder, wanted.kind, index, digest, scratch, trusted=trusted)
    if not folder.manifest.exists() or folder.manifest.read_bytes() != manifest.to_bytes():
        with atomic_file(folder.manifest, temporary_in=scratch) as handle:
            handle.write(manifest.to_bytes())
    clear_away(folder, set(index.plan_ids()), digest)
    forget_unreadable(folder)


def build_index(kind: Kind, readable: Readable, holdings: Holdings) -> Index:
    """Returns the index over segments known by header and segments that the old index has."""
    tables = [header_table(holdings.headers)]
    if holdings.old is not None:
        tables.append(holdings.old.row_table(holdings.kept))
    arrays = build_row_arrays(tables)
    return Index(kind, arrays | sample_arrays(kind, readable.samples, arrays["row_key"]))


def forget_unreadable(folder: CacheFolder) -> None:
    """Removes what writers told each other about rows that cannot be made; the manifest has it once it is published."""
    for note in folder.unreadable.glob("*"):
        note.unlink(missing_ok=True)


def clear_away(folder: CacheFolder, live: set[str], index: str) -> None:
    """Moves segments that are not live to the attic, foreign files aside, and removes other indexes."""
    for path in folder.strays(live, index):
        if path.parent == folder.indexes and path.name.endswith(".zarr"):
            remove_tree(path)
        elif is_segment(path):
            folder.displace(path)
        elif not path.name.startswith(".nfs"):  # the name that NFS gives to a removed file which somebody still reads
            log.warning("%s is no part of the cache: moved to %s", path, folder.set_aside(path))


def _write_index(folder: CacheFolder, kind: Kind, index: Index, digest: str, scratch: Path, *, trusted: bool) -> None:
    """Gives the index its name, unless an equal one has it. One that is damaged is set aside."""
    final = folder.index(digest)
    if final.exists() and not trusted:
        try:
            read_index(kind, digest, reader_of(final), str(final))
        except InputError:
            folder.set_aside(final)
    if final.exists():
        return
    with storage_errors(final):
        temporary = scratch / final.name
        index.write(temporary)
        with contextlib.suppress(FileExistsError):
            try:
                temporary.rename(final)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # another writer was first
                    raise
        sync_folder(final.parent)
