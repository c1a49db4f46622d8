"""Rows that need not be encoded: in segments that the plan no longer has, in unused ones, or in other caches."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sd3pipe.cache.folder import CacheFolder, is_segment
from sd3pipe.cache.keys import Kind
from sd3pipe.cache.plan import Leaf
from sd3pipe.cache.segment import RowInfo, StoredRow, read_exactly, read_header
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import digest_bytes

log = logging.getLogger(__name__)

Origin = Literal["copied", "unused"]


@dataclass(frozen=True, slots=True)
class _StoredAt:
    path: Path
    start: int
    size: int
    info: RowInfo
    origin: Origin


class ReusableRows:
    """Where to copy rows from, by key. Reads the headers of all segments outside the plan, once.

    `spoiled` collects the keys of rows whose bytes proved damaged; their copies are not taken again.
    """

    def __init__(
        self,
        folder: CacheFolder,
        kind: Kind,
        planned: Iterable[Leaf],
        others: Iterable[Path] = (),
        spoiled: set[str] | None = None,
    ) -> None:
        self._folder = folder
        self._spoiled = set() if spoiled is None else spoiled
        self._rows: dict[str, _StoredAt] = {}
        plan_ids = {leaf.plan_id for leaf in planned}
        unplanned = [path for plan_id, path in folder.segment_ids().items() if plan_id not in plan_ids]
        for path in [*unplanned, *(path for other in others for path in CacheFolder(other).segment_ids().values())]:
            self._add(path, kind, "copied")
        for path in folder.unused_segments():
            self._add(path, kind, "unused")

    def __contains__(self, key: str) -> bool:
        return key in self._rows and key not in self._spoiled

    def take(self, key: str) -> tuple[StoredRow, Origin] | None:
        """Returns a row and where it came from; None, for good, if its bytes are not what they were."""
        row = self._rows[key]
        path = row.path if row.path.exists() else self._folder.find_segment(row.path.name.split(".")[0])
        try:
            with open(path or row.path, "rb", buffering=0) as file:
                data = read_exactly(file.fileno(), row.size, row.start)
        except (OSError, EOFError) as error:
            log.warning("%s cannot be read (%s): its rows are encoded again", row.path, error)
        else:
            if digest_bytes(data) == row.info.digest:
                return StoredRow(row.info, [data]), row.origin
            log.warning("%s has a damaged row: it is encoded again", row.path)
        self._spoiled.add(key)
        return None

    def _add(self, path: Path, kind: Kind, origin: Origin) -> None:
        if not is_segment(path):
            return
        try:
            header = read_header(path)
        except FileNotFoundError:  # another writer made it an unused one, which is found next
            return
        except InputError as error:
            log.warning("%s: not used", error)
            return
        if header.kind == kind:
            for info, start, size in header.placed_rows():
                self._rows.setdefault(info.key, _StoredAt(path, start, size, info, origin))
