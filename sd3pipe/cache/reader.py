"""Reads rows of a published cache, in any process, in any order, each with one read from one file."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sd3pipe.cache.cache_files import cache_files
from sd3pipe.cache.folder import INDEX, INDEX_SUFFIX, MANIFEST
from sd3pipe.cache.index import Index, read_index
from sd3pipe.cache.manifest import Manifest, contradiction, parse_manifest
from sd3pipe.cache.rows import Tensor, row_from_bytes
from sd3pipe.cache.samples import Samples
from sd3pipe.cache.segment import key_is_true, parse_header
from sd3pipe.errors import InputError, StaleError
from sd3pipe.fingerprint import digest_bytes
from sd3pipe.words import VerifyReads


class CacheReader:
    """A published cache, open for reading. Safe to pickle and to fork; every process opens the files for itself.

    `verify_reads` says when a row's bytes are compared with its digest: on its first read here, always, or never.
    Raises InputError for anything that is no whole cache, StaleError for one whose manifest contradicts its rows.
    """

    def __init__(self, where: str | Path, *, verify_reads: VerifyReads = "first") -> None:
        if verify_reads not in get_args(VerifyReads):
            raise ValueError(f"verify_reads is {verify_reads}, not one of {get_args(VerifyReads)}")
        self._load(where, verify_reads)
        self._check_manifest()

    def __getstate__(self) -> dict[str, Any]:
        return {"where": self.where, "verify": self._verify, "index": self.manifest.index}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._load(state["where"], state["verify"])
        if self.manifest.index != state["index"]:
            raise InputError(f"{self.where} was encoded again while it was being read: start again")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def samples(self) -> Samples:
        return self.index.samples

    @property
    def keys(self) -> np.ndarray:
        """The keys of all rows, ascending: uint8 [rows, 32]."""
        return self.index.arrays["row_key"]

    def number(self, key: str) -> int:
        """Returns the number of the row with a key of 64 hex digits. Raises InputError if there is none."""
        number = self.index.number(key)
        if number is None:
            raise InputError(f"{self.where} has no row {key}")
        return number

    def shapes(self, row: int | str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a row's tensors without reading it."""
        number = self.number(row) if isinstance(row, str) else row
        return {name: shape for name, _, shape in self.index.layouts[self.index.arrays["row_layout"][number]]}

    def row(self, row: int | str) -> dict[str, Tensor]:
        """Returns a row by number or key, in memory that belongs to the caller.

        Raises InputError if its segment is missing or cut short, or if its bytes are not what was encoded.
        """
        number = self.number(row) if isinstance(row, str) else int(row)
        arrays = self.index.arrays
        plan_id = self._plan_ids[arrays["row_segment"][number]]
        try:
            data = self._files.read_segment(
                plan_id, int(arrays["row_offset"][number]), int(arrays["row_bytes"][number])
            )
        except PermissionError:
            raise  # nothing is damaged
        except (OSError, EOFError) as error:
            raise InputError(f"{self.where}: row {number} cannot be read ({error}): {_CURE}") from error
        if self._verify == "always" or (self._verify == "first" and not self._verified[number]):
            if digest_bytes(data) != arrays["row_digest"][number].tobytes():
                raise InputError(f"{self.where}: row {number} in segment {plan_id} is damaged: {_CURE}")
            self._verified[number] = True
        return row_from_bytes(self.index.layouts[arrays["row_layout"][number]], data)

    def _load(self, where: str | Path, verify_reads: VerifyReads) -> None:
        self.where = str(where)
        self._verify: VerifyReads = verify_reads
        self._files = cache_files(where)
        self.manifest = self._read_manifest()
        try:
            self.index = self._read_index()
        except InputError:  # once more if a writer swapped them in between
            older, self.manifest = self.manifest, self._read_manifest()
            if self.manifest.index == older.index:
                raise
            self.index = self._read_index()
        self._plan_ids = self.index.plan_ids()
        self._verified = np.zeros(len(self.index), bool)

    def _check_manifest(self) -> None:
        """Raises StaleError where the manifest contradicts what the rows of the first segment were made from.

        All rows are made from equal weights by one recipe, and their keys, which the index has, prove from which. A
        segment that is missing or damaged is told when its rows are read.
        """
        arrays, header = self.index.arrays, None
        offsets = arrays["row_offset"][arrays["row_segment"] == 0]
        if len(offsets):
            with contextlib.suppress(OSError, EOFError, InputError):
                header = parse_header(self._files.read_segment(self._plan_ids[0], 0, int(offsets.min())), self.where)
        if header is None or not header.rows:
            return
        if not key_is_true(header.kind, header.rows[0]):
            raise InputError(f"{self.where}: row {header.rows[0].key} was not made from what its key says: {_CURE}")
        said = contradiction(self.manifest, header.rows[0].ingredients)
        if said:
            raise StaleError(
                f"{self.where}/{MANIFEST} {said}: it was changed: restore it, or run the encode stage, which writes it "
                "anew and keeps the rows"
            )

    def _read_manifest(self) -> Manifest:
        try:
            data = bytes(self._files.read(MANIFEST))
        except FileNotFoundError:
            raise InputError(f"{self.where} holds no finished cache: encode first, or name another folder") from None
        except OSError as error:
            raise InputError(f"{self.where} cannot be read ({error.strerror})") from error
        return parse_manifest(data, f"{self.where}/{MANIFEST}")

    def _read_index(self) -> Index:
        kind, digest = self.manifest.kind, self.manifest.index
        folder = f"{INDEX}/{digest}{INDEX_SUFFIX}"
        return read_index(kind, digest, lambda name: self._files.read(f"{folder}/{name}"), f"{self.where}/{folder}")


_CURE = "run `sd3pipe cache verify --repair`, then encode again"
