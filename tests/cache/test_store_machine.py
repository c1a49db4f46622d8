"""The store against a dict: after any history, with crashes, a filled folder equals one encoded from nothing."""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.comparing import folder_bytes
from support.fake_cache import fake_row, fill, wanted_texts

from sd3pipe.cache import publish, segment, store
from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.listing import delete_unused
from sd3pipe.cache.merge import merge_caches
from sd3pipe.cache.reader import CacheReader

NAMES = [f"{number:02}.png" for number in range(40)]
TEXTS = [f"caption {number}" for number in range(12)]

# Each point is a function whose n-th call is the last thing that a process does, or the last that it does not do.
CRASH_POINTS = [
    (segment, "publish_once"),
    (store, "write_segment"),
    (store.SegmentPlan, "note_unreadable"),
    (publish, "_write_index"),
    (publish, "sync_folder"),
    (publish, "atomic_file"),
    (CacheFolder, "displace"),
    (publish, "remove_tree"),
    (publish, "clear_away"),
]


def killed_while(act, point: int, call: int, *, after: bool) -> None:
    """Runs `act` in a forked process that SIGKILLs itself at a call of a crash point, if it gets there."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            owner, name = CRASH_POINTS[point]
            original, calls = getattr(owner, name), iter(range(1000))

            def deadly(*args, **kwargs):
                last = next(calls) == call
                if last and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **kwargs)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(owner, name, deadly)
            act()
        os._exit(0)
    os.waitpid(process, 0)


class StoreMachine(RuleBasedStateMachine):
    """The dict is `dataset`: caption by picture name. `unreadable` captions stay so for a whole history."""

    revisions = Bundle("revisions")

    @initialize(unreadable=st.sets(st.sampled_from(TEXTS), max_size=2))
    def start(self, unreadable):
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.out = self.root / "caches" / "text"
        self.dataset: dict[str, str] = {"00.png": "the first picture"}
        self.unreadable = dict.fromkeys(unreadable, "cut short")
        self.filled: dict[str, str] | None = None
        self.fresh_count = 0

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def wanted(self):
        return wanted_texts(self.dataset, rows_per_segment=2)

    def encode(self, **options):
        return fill(self.out, self.wanted(), unreadable=self.unreadable, **options)

    @rule(target=revisions)
    def note_this_revision(self):
        return dict(self.dataset)

    @rule(revision=revisions)
    def revert(self, revision):
        self.dataset = dict(revision)

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from(TEXTS))
    def add_or_change(self, name, text):
        self.dataset[name] = text

    @rule(start=st.integers(0, 39), count=st.integers(1, 15))
    def add_many(self, start, count):
        self.dataset |= {name: f"text of {name}" for name in NAMES[start : start + count]}

    @precondition(lambda self: len(self.dataset) > 1)
    @rule(data=st.data())
    def remove(self, data):
        del self.dataset[data.draw(st.sampled_from(sorted(self.dataset)))]

    @rule()
    def encode_all(self):
        counts = self.encode()
        assert counts.published
        self.filled = dict(self.dataset)

    @rule(order=st.permutations(range(3)))
    def encode_in_shards(self, order):
        for shard in order:
            published = self.encode(shard=(shard, 3)).published
        assert published
        self.filled = dict(self.dataset)

    @rule(point=st.integers(0, len(CRASH_POINTS) - 1), call=st.integers(0, 6), after=st.booleans())
    def crash_while_encoding(self, point, call, after):
        killed_while(self.encode, point, call, after=after)
        self.filled = None

    @precondition(lambda self: CacheFolder(self.out).machine.exists())  # what was never encoded is refused
    @rule()
    def empty_the_unused_rows(self):
        delete_unused(self.out)

    @precondition(lambda self: self.filled is not None)
    @rule(start=st.integers(0, 39), count=st.integers(1, 10))
    def merge_with_another_machine(self, start, count):
        there = {name: f"text of {name}" for name in NAMES[start : start + count] if name not in self.filled}
        if not there:
            return
        fill(self.root / "other" / "text", wanted_texts(there, rows_per_segment=2), unreadable=self.unreadable)
        merge_caches([self.out, self.root / "other" / "text"], self.out)
        self.filled = {**self.filled, **there}
        self.dataset = dict(self.filled)

    @invariant()
    def a_filled_folder_equals_a_fresh_one(self):
        if getattr(self, "filled", None) is None:
            return
        self.fresh_count += 1
        fresh = self.root / f"fresh{self.fresh_count}" / "text"
        wanted = wanted_texts(self.filled, rows_per_segment=2)
        fill(fresh, wanted, unreadable=self.unreadable)
        assert folder_bytes(self.out) == folder_bytes(fresh)
        shutil.rmtree(fresh.parent)

    @invariant()
    def every_listed_row_can_be_read(self):
        if not hasattr(self, "out") or not (self.out / "manifest.json").exists():
            return
        reader = CacheReader(self.out, verify_reads="always")
        sources = {key: row.source for key, row in zip(self.wanted().keys, self.wanted().rows, strict=True)}
        for number in range(len(reader)):
            row, key = reader.row(number), reader.keys[number].tobytes().hex()
            if key in sources:
                assert bytes(row["hidden"].data) == bytes(fake_row(sources[key])["hidden"].data)


class LongStoreMachine(StoreMachine):
    """The same, for longer."""


def _settings(examples, steps):
    quiet = list(HealthCheck)
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=quiet, derandomize=True
    )


StoreMachine.TestCase.settings = _settings(15, 15)
LongStoreMachine.TestCase.settings = _settings(75, 30)
TestStoreMachine = pytest.mark.long(StoreMachine.TestCase)
TestLongStoreMachine = pytest.mark.slow(LongStoreMachine.TestCase)
