"""The encode driver: fills a cache with the rows that a dataset needs, whatever is there already and whoever helps."""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from sd3pipe import stopping
from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.last_run import note_wanted
from sd3pipe.cache.plan import Leaf, plan_id
from sd3pipe.cache.publish import forget_unreadable, publish, published_manifest
from sd3pipe.cache.reusable import ReusableRows
from sd3pipe.cache.rows import Row, layout_of
from sd3pipe.cache.segment import RowInfo, StoredRow, read_header, write_segment
from sd3pipe.cache.segment_plan import SegmentPlan
from sd3pipe.cache.wanted import Wanted
from sd3pipe.cache.writers import is_alone, writing
from sd3pipe.console import readable_bytes
from sd3pipe.errors import InputError, Stopped, StorageError, UnreadablePicture
from sd3pipe.files import free_bytes, storage_errors
from sd3pipe.fingerprint import hash_chunks

log = logging.getLogger(__name__)

EncodedRows = Iterator[tuple[str, Row | UnreadablePicture]]  # by key
Encode = Callable[[Sequence[str]], EncodedRows]
NO_PART = (sys.maxsize, sys.maxsize)  # as `shard`: encodes nothing
Outcome = Literal["in_place", "copied", "unused", "encoded", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FillCounts:
    """What became of the wanted rows. Together the first six are all of them."""

    in_place: int  # in a segment that was kept unread
    copied: int = 0  # from segments of an earlier plan, or of another cache
    unused: int = 0  # from unused segments; "attic" in a report
    encoded: int = 0
    failed: int  # rows that cannot be made: their pictures are unreadable
    left: int = 0  # rows that other shards make, or made
    quarantined: int  # pictures that the manifest lists as unreadable
    published: bool  # false while other shards have rows to make

    @property
    def reused(self) -> int:
        """Rows that were not run through an encoder."""
        return self.in_place + self.copied + self.unused

    def since(self, missing: "Missing") -> "FillCounts":
        """Returns the counts of a run that found so much missing, of which other processes made what this one found."""
        encoded = len(missing.keys) - (self.failed - missing.unreadable)
        return replace(self, encoded=encoded, in_place=self.in_place + self.encoded - encoded)

    def as_report(self) -> dict[str, int]:
        """Returns the counts for the stage's report."""
        names = ("in_place", "copied", "encoded", "failed", "left", "quarantined")
        return {"reused": self.reused, "attic": self.unused} | {name: getattr(self, name) for name in names}

    def summary(self) -> str:
        """Returns the counts in the user's words."""
        text = f"{self.reused} reused, {self.encoded} encoded, {self.quarantined} quarantined"
        if self.published and not (self.copied or self.unused or self.encoded or self.failed):
            text = f"nothing to do: {text}"
        return text if self.published else text + f", {self.left} left to the other shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    keys: tuple[str, ...]
    nbytes: int  # nominal size of all segments that would be written, copied rows included
    free_bytes: int
    unreadable: int  # rows that are known not to be makeable, and are not tried again


def fill_cache(
    out: Path,
    wanted: Wanted,
    encode: Encode,
    *,
    made_with: str,
    shard: tuple[int, int] = (0, 1),
    retry_unreadable: bool = False,
    others: Sequence[Path] = (),
) -> FillCounts:
    """Makes `out` hold exactly the wanted rows and returns what it took.

    `encode` is called, once unless rows at hand prove damaged, with the keys that this process must make, in the order
    in which it has to yield them. With `shard` (i, n) the process makes every n-th segment from the i-th on, and
    whoever finds the cache complete publishes it. `others` are caches to copy rows from. `made_with` names the library
    versions, recorded beside each row.

    Raises InputError for a folder that is no cache of this kind, StaleError if another plan is being filled in it,
    StorageError if the disk is full or not writable; whatever was complete by then is used by the next run.
    """
    folder = CacheFolder(out)
    folder.check_ours()
    published_manifest(folder, wanted.kind)
    folder.create()
    with writing(folder, wanted.identity) as scratch:
        note_wanted(folder, wanted)
        if retry_unreadable and is_alone(folder, scratch):
            forget_unreadable(folder)
        plan = SegmentPlan(folder, wanted, retry_unreadable=retry_unreadable)
        return _Fill(folder, wanted, plan, scratch, made_with, others).run(encode, shard)


def missing_rows(out: Path, wanted: Wanted) -> Missing:
    """Returns what `fill_cache` would encode, without touching the cache. Raises InputError like `fill_cache`."""
    folder = CacheFolder(out)
    folder.check_ours()
    plan = SegmentPlan(folder, wanted, read_only=True)
    lacking = plan.lacking()
    reusable = ReusableRows(folder, wanted.kind, plan.leaves) if lacking else ()
    note_wanted(folder, wanted)
    return Missing(
        keys=tuple(key for leaf in lacking for key in leaf.keys if key not in reusable),
        nbytes=sum(leaf.nbytes * len(leaf.keys) for leaf in lacking),
        free_bytes=free_bytes(out),
        unreadable=len(plan.unreadable),
    )


def check_room(out: Path, needed: int) -> None:
    """Raises StorageError where the disk of a cache has not so many bytes left."""
    free = free_bytes(out)
    if needed > free:
        raise StorageError(
            f"{out}: {readable_bytes(needed)} to be written, {readable_bytes(free)} free: "
            "free space (`sd3pipe cache gc` empties unused rows), or choose another --out"
        )


@dataclass(slots=True)
class _Fill:
    """One writer at work."""

    _folder: CacheFolder
    _wanted: Wanted
    _plan: SegmentPlan
    _scratch: Path
    _made_with: str
    _others: Sequence[Path]
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _spoiled: set[str] = field(default_factory=set)  # rows of which a copy at hand is damaged

    def run(self, encode: Encode, shard: tuple[int, int]) -> FillCounts:
        """Makes this process's share, completes what rows at hand are enough for, and publishes a complete cache."""
        for leaf in self._plan.leaves:
            if self._plan.present(leaf):
                self._count(leaf.keys, "in_place")
        share = self._plan.share(shard)
        for settle in (False, True):
            while self._round(encode, share, settle=settle):
                pass
        complete = not self._plan.lacking()
        if complete:
            tables = self._plan.row_tables()
            publish(self._folder, self._wanted, self._plan.readable, tables, self._plan.index_digest, self._scratch)
        self._count(tuple(self._plan.unreadable), "failed")
        counts = Counter(self._outcomes.values())
        return FillCounts(
            **{name: counts[name] for name in get_args(Outcome)},
            left=len(self._wanted.row_by_key) - len(self._outcomes),
            quarantined=len(self._plan.readable.unreadable),
            published=complete,
        )

    def _round(self, encode: Encode, share: set[str], *, settle: bool) -> bool:
        """Makes what can be made now; returns whether there was anything. Another round sees the plan that results."""
        self._plan.learn_unreadable()
        lacking = self._bring_back(self._plan.lacking())
        if not lacking:
            return False
        reusable = ReusableRows(self._folder, self._wanted.kind, self._plan.leaves, self._others, self._spoiled)
        jobs: list[tuple[Leaf, list[str]]] = []
        for leaf in lacking:
            missing = [key for key in leaf.keys if key not in reusable]
            mine = [key for key in missing if key in share]
            if mine or (not missing and (settle or leaf.keys[0] in share)):
                jobs.append((leaf, mine))
        check_room(self._folder.path, sum(leaf.nbytes * len(leaf.keys) for leaf, _ in jobs))
        keys = [key for _, mine in jobs for key in mine]
        rows = iter(encode(keys)) if keys else iter(())
        try:
            for leaf, mine in jobs:
                stopping.check()
                self._make(leaf, mine, rows, reusable)
        finally:
            getattr(rows, "close", lambda: None)()
        return bool(jobs)

    def _make(self, leaf: Leaf, mine: list[str], rows: EncodedRows, reusable: ReusableRows) -> None:
        """Writes one segment; an incomplete one, under its own id, if others must make some of its rows.

        Asked to stop, it keeps in the same way what is encoded by then.
        """
        fresh: list[StoredRow] = []
        with contextlib.suppress(Stopped):
            for key in mine:
                stopping.check()
                if (row := self._encoded(key, rows)) is not None:
                    fresh.append(row)
        copies = [taken for key in leaf.keys if key in reusable and (taken := reusable.take(key)) is not None]
        complete = len(fresh) + len(copies) == len(leaf.keys)
        stored = fresh + [row for row, _ in copies] if complete else fresh
        if not stored:
            return
        name = plan_id(self._wanted.kind, [row.info.key for row in stored])
        write_segment(
            self._folder.segment(name),
            kind=self._wanted.kind,
            group=leaf.group,
            nbytes=leaf.nbytes,
            rows=stored,
            scratch=self._scratch,
        )
        self._count([row.info.key for row in fresh], "encoded")
        for row, origin in copies if complete else ():
            self._count([row.info.key], origin)

    def _encoded(self, key: str, rows: EncodedRows) -> StoredRow | None:
        """Returns the encoder's next row, which must be `key`; None, noted for all writers, if it is unreadable."""
        yielded, row = next(rows, (None, UnreadablePicture("")))
        if yielded != key:
            raise AssertionError(f"the encoder yielded row {yielded}, asked for was {key}")
        if isinstance(row, UnreadablePicture):
            self._plan.note_unreadable(key, str(row))
            return None
        layout = layout_of(row)
        buffers = [memoryview(row[name].data).cast("B") for name, _, _ in layout]
        info = RowInfo(
            key=key,
            layout=layout,
            digest=bytes.fromhex(hash_chunks(buffers)),
            source=self._wanted.row_by_key[key].source,
            ingredients=self._wanted.ingredients(key),
            made_with=self._made_with,
        )
        return StoredRow(info, buffers)

    def _bring_back(self, lacking: list[Leaf]) -> list[Leaf]:
        """Moves whole segments back from the unused ones and returns those that are not there either."""
        unused = {path.name: path for path in self._folder.unused_segments()} if lacking else {}
        still_lacking = []
        for leaf in lacking:
            final = self._folder.segment(leaf.plan_id)
            if final.name in unused and self._bring_back_one(unused[final.name], final) and self._plan.present(leaf):
                self._count(leaf.keys, "unused")
            else:
                still_lacking.append(leaf)
        return still_lacking

    def _bring_back_one(self, path: Path, final: Path) -> bool:
        try:
            read_header(path)
            with storage_errors(path):
                path.replace(final)
        except FileNotFoundError:  # another writer brought it back
            return True
        except InputError as error:
            log.warning("%s: moved to %s", error, self._folder.set_aside(path))
            return False
        return True

    def _count(self, keys: Sequence[str], outcome: Outcome) -> None:
        for key in keys:
            self._outcomes.setdefault(key, outcome)
