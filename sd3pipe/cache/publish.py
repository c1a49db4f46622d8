"""The one moment in which a cache changes for its readers: the swap of manifest.json."""

import contextlib
import errno
import logging
from collections.abc import Sequence
from pathlib import Path

from sd3pipe.cache.folder import CacheFolder, entries_of, is_segment
from sd3pipe.cache.index import Index, RowTable, build_row_arrays, read_index
from sd3pipe.cache.keys import Kind
from sd3pipe.cache.manifest import Manifest, read_manifest
from sd3pipe.cache.samples import hex_list, sample_arrays
from sd3pipe.cache.wanted import Readable, Wanted
from sd3pipe.cache.zarr_group import ReadFile, arrays_hash, write_group
from sd3pipe.documents import MOST_LIST_BYTES, holds, read_data
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_file, storage_errors, sync_folder
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.temporaries import remove_tree

log = logging.getLogger(__name__)


def published_manifest(folder: CacheFolder, kind: Kind) -> Manifest | None:
    """Returns what is published now. Raises InputError for a cache of another kind or a manifest that is damaged."""
    manifest = read_manifest(folder.manifest)
    if manifest is not None and manifest.kind != kind:
        raise InputError(f"{folder.path} is a cache of {manifest.kind}, not of {kind}: choose another --out")
    return manifest


def load_published(folder: CacheFolder, kind: Kind) -> tuple[Manifest | None, Index | None]:
    """Returns manifest and index. A damaged index is None: it is made again from the segments. Raises InputError."""
    manifest = published_manifest(folder, kind)
    if manifest is None:
        return None, None
    try:
        return manifest, open_index(folder, manifest)
    except InputError as error:
        log.warning("%s: the index is made again", error)
        return manifest, None


def whole(cache: Path) -> str | None:
    """Returns the hash of what is published if all of that is there, nothing else is and nobody is at work, else None.

    Of segments the sizes are compared, as `fill_cache` does.
    """
    folder = CacheFolder(cache)
    try:
        folder.check_ours()
        manifest = read_manifest(folder.manifest)
        index = open_index(folder, manifest) if manifest else None
        if manifest is None or index is None or any(map(entries_of, (folder.writers, folder.unreadable))):
            return None
        sizes = {folder.segment(plan_id): size for plan_id, size in index.segments().items()}
        there = all(path.stat().st_size == size for path, size in sizes.items())
        alone = not folder.strays(set(index.plan_ids()), manifest.index)
        return hash_bytes(manifest.to_bytes()) if there and alone else None
    except (InputError, OSError):
        return None


def open_index(folder: CacheFolder, manifest: Manifest) -> Index:
    """Returns the index that a manifest names, checked. Raises InputError."""
    path = folder.index(manifest.index)
    return read_index(manifest.kind, manifest.index, reader_of(path), str(path))


def reader_of(folder: Path) -> ReadFile:
    """Returns what reads the files of an index's folder."""
    return lambda name: read_data(folder / name, most_bytes=MOST_LIST_BYTES)


def publish(
    folder: CacheFolder, wanted: Wanted, readable: Readable, tables: Sequence[RowTable], checked: str, scratch: Path
) -> None:
    """Makes index and manifest say what the plan's segments hold, then moves away what they do not need.

    `tables` have the rows of all segments; `checked` names an index whose files were read and found right. Files that
    are right are not touched. Raises StorageError.
    """
    arrays = build_row_arrays(tables)
    assert hex_list(arrays["row_key"]) == sorted(readable.keys), "the plan's segments hold other rows than planned"
    index = Index(wanted.kind, arrays | sample_arrays(wanted.kind, readable.samples, arrays["row_key"]))
    digest = arrays_hash(index.arrays)
    manifest = Manifest(
        kind=wanted.kind,
        recipe=wanted.recipe,
        recipe_version=wanted.recipe_version,
        fingerprints=wanted.fingerprints,
        subsets=wanted.subsets,
        quarantined=readable.unreadable,
        rows=len(index),
        samples=len(index.samples),
        index=digest,
        tags=wanted.tags,
        extra=wanted.extra,
    )
    _write_index(folder, index, digest, scratch, trusted=checked == digest)
    if not holds(folder.manifest, manifest.to_bytes()):
        with atomic_file(folder.manifest, temporary_in=scratch) as handle:
            handle.write(manifest.to_bytes())
    clear_away(folder, set(index.plan_ids()), digest)
    forget_unreadable(folder)


def forget_unreadable(folder: CacheFolder) -> None:
    """Removes what writers told each other about rows that cannot be made; the manifest has it once it is published."""
    for note in folder.unreadable.glob("*"):
        note.unlink(missing_ok=True)


def clear_away(folder: CacheFolder, live: set[str], index: str) -> None:
    """Makes segments that are not live unused ones, moves foreign files aside, and removes other indexes."""
    for path in folder.strays(live, index):
        if path.parent == folder.indexes and path.name.endswith(".zarr"):
            remove_tree(path)
        elif is_segment(path):
            folder.displace(path)
        elif not path.name.startswith(".nfs"):  # the name that NFS gives to a removed file which somebody still reads
            log.warning("%s is no part of the cache: moved to %s", path, folder.set_aside(path))


def _write_index(folder: CacheFolder, index: Index, digest: str, scratch: Path, *, trusted: bool) -> None:
    """Gives the index its name, unless an equal one has it. One that is damaged is set aside."""
    final = folder.index(digest)
    if final.exists() and not trusted:
        try:
            read_index(index.kind, digest, reader_of(final), str(final))
        except InputError:
            folder.set_aside(final)
    if final.exists():
        return
    with storage_errors(final):
        temporary = scratch / final.name
        write_group(temporary, index.arrays)
        with contextlib.suppress(FileExistsError):
            try:
                temporary.rename(final)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # another writer was first
                    raise
        sync_folder(final.parent)
