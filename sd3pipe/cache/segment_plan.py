"""Which segments a cache should have and which of them are there, as one process sees it at one moment."""

import contextlib
import logging
from dataclasses import dataclass

from pydantic import TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.index import RowTable, header_table
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.plan import Leaf, plan_leaves
from sd3pipe.cache.publish import load_published
from sd3pipe.cache.segment import SegmentHeader, read_header
from sd3pipe.cache.wanted import Wanted
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError, is_of_the_moment
from sd3pipe.files import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What writers tell each other about a row that cannot be made."""

    reason: str


_NOTE = TypeAdapter(_Note)


class SegmentPlan:
    """The segments of all wanted rows that can be made: `leaves`; `readable` has those rows with their samples."""

    def __init__(
        self, folder: CacheFolder, wanted: Wanted, *, read_only: bool = False, retry_unreadable: bool = False
    ) -> None:
        self._folder, self._wanted, self._read_only = folder, wanted, read_only
        manifest, self._index = load_published(folder, wanted.kind)
        self._distrusted = manifest if retry_unreadable else None
        self.index_digest = manifest.index if manifest is not None and self._index is not None else ""
        self._known_sizes = self._index.segments() if self._index is not None else {}
        self._headers: dict[str, SegmentHeader] = {}
        self.unreadable: dict[str, str] = {}  # reason by key
        self.readable = wanted.without({})
        self.leaves = self._whole = self._plan()
        self.learn_unreadable()

    def learn_unreadable(self) -> None:
        """Takes out the rows that other writers, or an earlier run, found unreadable for good."""
        found: dict[str, str] = {}
        for note in sorted(self._folder.unreadable.glob("*.json")):  # notes first: publishing removes them last
            with contextlib.suppress(DocumentError):  # a row whose note is damaged is tried again
                found[note.stem] = read_json(note, _NOTE).reason
        manifest = read_manifest(self._folder.manifest)
        if manifest is not None and manifest != self._distrusted:
            lasting = {key: why for key, why in manifest.unreadable_rows().items() if not is_of_the_moment(why)}
            found = lasting | found
        new = {key: found[key] for key in found.keys() - self.unreadable.keys() if key in self._wanted.row_by_key}
        if new:
            self.unreadable |= new
            self.readable = self._wanted.without(self.unreadable)
            self.leaves = self._plan()

    def note_unreadable(self, key: str, reason: str) -> None:
        """Makes it known to all writers that a row cannot be made. Raises StorageError."""
        write_json(self._folder.unreadable / f"{key}.json", {"reason": reason})

    def share(self, shard: tuple[int, int]) -> set[str]:
        """Returns the rows that one of n processes makes: every n-th segment of the plan for all wanted rows.

        Unreadable rows count here: processes that start later know of more of them, and must not share out otherwise.
        """
        return {key for leaf in self._whole[shard[0] :: shard[1]] for key in leaf.keys}

    def present(self, leaf: Leaf) -> bool:
        """Whether a segment is there and whole; one that is damaged is set aside."""
        if leaf.plan_id in self._headers:
            return True
        path = self._folder.segment(leaf.plan_id)
        try:
            if self._known_sizes.get(leaf.plan_id) != path.stat().st_size:
                self._headers[leaf.plan_id] = read_header(path)
                self._known_sizes.pop(leaf.plan_id, None)
        except FileNotFoundError:
            return False
        except InputError as error:
            if not self._read_only:
                log.warning("%s: moved to %s", error, self._folder.set_aside(path))
            return False
        return True

    def lacking(self) -> list[Leaf]:
        """Returns the segments that are not there."""
        return [leaf for leaf in self.leaves if not self.present(leaf)]

    def row_tables(self) -> list[RowTable]:
        """Returns the rows of the segments, all of which must be present: as the index has them, else by header."""
        planned = {leaf.plan_id for leaf in self.leaves}
        tables = [header_table({name: header for name, header in self._headers.items() if name in planned})]
        if self._index is not None:
            tables.append(self._index.row_table(planned - set(self._headers)))
        return tables

    def _plan(self) -> list[Leaf]:
        rows = self._wanted.row_by_key.items()
        keys = self.readable.keys
        return plan_leaves(self._wanted.kind, ((key, row.group, row.nbytes) for key, row in rows if key in keys))
