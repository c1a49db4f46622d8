"""Decodes rows ahead in worker processes, in order, with a bound on what is held in memory.

Workers are spawned, not forked, so the parent may hold a CUDA context and threads. A worker that dies (out of memory, a
crash in a codec) costs the one picture that kills it, not the run.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from sd3pipe.data.decoding import Job, Pixels, decode_row
from sd3pipe.data.headers import DECODER_ERRORS, MAX_PIXELS, UnreadablePicture, reason

_AHEAD_BYTES = 512 << 20  # decoded pixels waiting for the encoder, at most
_AHEAD_PER_WORKER = 4
_THREADS = "OPENBLAS_NUM_THREADS"  # what numpy's products go by


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Stands in the place of a row that cannot be decoded."""

    reason: str


def decoded_rows(jobs: Iterable[Job], *, workers: int, max_pixels: int = MAX_PIXELS) -> Iterator[Pixels | Broken]:
    """Yields the pixels of each job in order; `workers` = 0 decodes in this process."""
    if workers == 0:
        for job in jobs:
            yield _attempt(job, max_pixels)
        return
    feed = _Feed(workers, max_pixels)
    try:
        yield from feed.run(iter(jobs))
    finally:
        feed.close()


def default_workers() -> int:
    """Returns as many workers as there are cores this process may use, eight at the most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


class _Feed:
    """A pool that is made anew when a worker dies."""

    def __init__(self, workers: int, max_pixels: int) -> None:
        self.workers, self.max_pixels = workers, max_pixels
        self.threads_before = os.environ.get(_THREADS)
        os.environ[_THREADS] = "1"  # for the workers: they are as many as the cores
        self.pool = self._new_pool(workers)
        self.waiting: deque[tuple[Job, Future[Pixels | Broken]]] = deque()

    def run(self, jobs: Iterator[Job]) -> Iterator[Pixels | Broken]:
        held_bytes = 0
        for job in jobs:
            self.waiting.append((job, self.pool.submit(_attempt, job, self.max_pixels)))
            held_bytes += _row_bytes(job)
            while held_bytes > _AHEAD_BYTES or len(self.waiting) > self.workers * _AHEAD_PER_WORKER:
                held_bytes -= _row_bytes(self.waiting[0][0])
                yield self._next()
        while self.waiting:
            yield self._next()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.threads_before is None:
            os.environ.pop(_THREADS, None)
        else:
            os.environ[_THREADS] = self.threads_before

    def _next(self) -> Pixels | Broken:
        job, future = self.waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            return self._after_a_death(job)

    def _after_a_death(self, job: Job) -> Pixels | Broken:
        """Decodes one job alone in a fresh worker, then sets the others going again."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        lone = self._new_pool(1)
        try:
            result = lone.submit(_attempt, job, self.max_pixels).result()
        except BrokenProcessPool:
            result = Broken(reason="it ended the process that decoded it")
        finally:
            lone.shutdown(wait=False)
        self.pool = self._new_pool(self.workers)
        again = [(other, self._again(other, future)) for other, future in self.waiting]
        self.waiting = deque(again)
        return result

    def _again(self, job: Job, future: "Future[Pixels | Broken]") -> "Future[Pixels | Broken]":
        """Keeps a finished result; submits the job once more otherwise."""
        if future.done() and not future.cancelled() and future.exception() is None:
            return future
        return self.pool.submit(_attempt, job, self.max_pixels)

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _attempt(job: Job, max_pixels: int) -> Pixels | Broken:
    try:
        return decode_row(job, max_pixels)
    except UnreadablePicture as error:
        return Broken(reason=str(error))
    except DECODER_ERRORS as error:
        return Broken(reason=f"it cannot be decoded ({type(error).__name__}: {reason(error)})")


def _row_bytes(job: Job) -> int:
    return 3 * job.cut.size[0] * job.cut.size[1]
