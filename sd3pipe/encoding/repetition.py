"""A run that would find what the last one found tells it again, and looks into nothing.

That takes the stat of every file and the names of the segments; to make up one's mind about 100,000 pictures anew takes
ten times as long.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.last_run import LastRun, last_run
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.publish import whole
from sd3pipe.cache.store import FillCounts
from sd3pipe.cache.wanted import Wanted
from sd3pipe.console import StageReport, version
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.findings import decoder
from sd3pipe.data.scan import watched_folders
from sd3pipe.errors import is_of_the_moment
from sd3pipe.fingerprint import hash_json
from sd3pipe.params.stage import shard_of_process
from sd3pipe.watched import state_of

log = logging.getLogger("sd3pipe")  # that of all, whose lines are told again


class Repetition:
    """Compares a run with the last one of its cache. Made before anything is read: what changes from then on counts.

    `recipe` tells what a run goes by beside the dataset, in JSON; it is asked for only where the dataset is as it was.
    """

    def __init__(
        self, out: Path, dataset: Path, recipe: Callable[[], Mapping[str, Any]], *, captions: bool, trust: bool
    ) -> None:
        self._out, self._dataset, self._recipe, self._trust = out, dataset, recipe, trust
        self._watched = watched_folders(load_dataset(dataset), captions=captions)
        alone = shard_of_process(None) == (0, 1)
        self._state = state_of(dataset, self._watched) if alone and self._watched is not None else None

    def tell(self, report: StageReport) -> bool:
        """Logs and reports what the last run did if this one would find the same; returns whether it does."""
        last = last_run(self._out) if self._trust and self._state else None
        if last is None or last.state != self._state or last.published != whole(self._out):
            return False
        if last.recipe != self._recipe_hash():
            return False
        for level, message in last.said:
            log.log(level, "%s", message)
        counts = FillCounts(in_place=last.rows, failed=last.failed, quarantined=last.quarantined, published=True)
        report.begin()
        report.update(**{**last.facts, **counts.as_report()})
        report.summary = counts.summary() + last.remark
        return True

    def note(
        self, wanted: Wanted, counts: FillCounts, facts: Mapping[str, Any], remark: str, said: list[tuple[int, str]]
    ) -> None:
        """Notes a run that published all that it found, if no other would find more. Raises StorageError."""
        published = whole(self._out) if counts.published and not counts.left else None
        manifest = read_manifest(CacheFolder(self._out).manifest) if published else None
        if manifest is not None and any(is_of_the_moment(entry["reason"]) for entry in manifest.quarantined):
            return
        if published is None or self._watched is None or self._state is None:
            return
        LastRun(
            dataset=str(self._dataset.resolve()),
            watched=self._watched,
            state=self._state,
            recipe=self._recipe_hash(),
            wanted=wanted.identity,
            published=published,
            rows=counts.reused + counts.encoded,
            failed=counts.failed,
            quarantined=counts.quarantined,
            facts=dict(facts),
            remark=remark,
            said=said,
        ).write(self._out)

    def _recipe_hash(self) -> str:
        return hash_json([version(), decoder(), str(Path.cwd()), self._recipe()])


@contextlib.contextmanager
def overheard() -> Iterator[list[tuple[int, str]]]:
    """Collects what is logged meanwhile, by level."""
    listener = _Listener()
    log.addHandler(listener)
    try:
        yield listener.said
    finally:
        log.removeHandler(listener)


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))
