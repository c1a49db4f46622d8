"""What a cache should hold and what of it is there, as one process sees it at one moment."""

import contextlib
import logging
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.plan import Leaf, plan_leaves
from sd3pipe.cache.publish import Holdings, load_published
from sd3pipe.cache.segment import SegmentHeader, read_header
from sd3pipe.cache.wanted import Readable, Wanted
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError
from sd3pipe.files import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What writers tell each other about a row that cannot be made."""

    reason: str


_NOTE = TypeAdapter(_Note)


class Census:
    """Which segments the plan has and which of them are there."""

    def __init__(
        self, folder: CacheFolder, wanted: Wanted, *, read_only: bool = False, retry_unreadable: bool = False
    ) -> None:
        self._folder, self._wanted, self._read_only = folder, wanted, read_only
        manifest, self._index = load_published(folder, wanted.kind)
        self._distrusted = manifest if retry_unreadable else None
        self._known_sizes = self._index.segments() if self._index is not None else {}
        self._headers: dict[str, SegmentHeader] = {}
        self.unreadable: dict[str, str] = {}
        self._planned: tuple[int, Readable, list[Leaf]] | None = None
        self.learn_unreadable()

    def learn_unreadable(self) -> None:
        """Adds the rows that other writers, or an earlier run, found unreadable."""
        for note in sorted(self._folder.unreadable.glob("*.json")):  # notes first: publishing removes them last
            with contextlib.suppress(DocumentError):  # a row whose note is damaged is tried again
                self._learn(note.stem, read_json(note, _NOTE).reason)
        manifest = read_manifest(self._folder.manifest)
        if manifest is not None and manifest != self._distrusted:
            for key, reason in manifest.unreadable_rows().items():
                self._learn(key, reason)

    def note_unreadable(self, key: str, reason: str) -> None:
        """Makes it known to all writers that a row cannot be made. Raises StorageError."""
        self._learn(key, reason)
        write_json(self._folder.unreadable / f"{key}.json", asdict(_Note(reason=reason)))

    def _learn(self, key: str, reason: str) -> None:
        if key in self._wanted.row_by_key:
            self.unreadable.setdefault(key, reason)

    def readable(self) -> Readable:
        """Returns what is wanted and can be made."""
        return self._plan()[1]

    def plan(self) -> list[Leaf]:
        """Returns the segments of all rows that can be made."""
        return self._plan()[2]

    def share(self, shard: tuple[int, int]) -> set[str]:
        """Returns the rows that one of n processes makes: every n-th segment of the plan for all wanted rows.

        Unreadable rows count here: processes that start later know of more of them, and must not share out otherwise.
        """
        rows = ((key, row.group, row.nbytes) for key, row in self._wanted.row_by_key.items())
        return {key for leaf in plan_leaves(self._wanted.kind, rows)[shard[0] :: shard[1]] for key in leaf.keys}

    def _plan(self) -> tuple[int, Readable, list[Leaf]]:
        if self._planned is None or self._planned[0] != len(self.unreadable):
            readable = self._wanted.without(self.unreadable)
            rows = (
                (key, row.group, row.nbytes) for key, row in self._wanted.row_by_key.items() if key in readable.keys
            )
            self._planned = len(self.unreadable), readable, plan_leaves(self._wanted.kind, rows)
        return self._planned

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

    def holdings(self) -> Holdings:
        """Returns how to index the plan's segments, all of which must be present."""
        planned = {leaf.plan_id for leaf in self.plan()}
        headers = {name: header for name, header in self._headers.items() if name in planned}
        return Holdings(headers=headers, old=self._index, kept=frozenset(planned - set(headers)))
