"""Decodes rows ahead in worker processes, in order, with a bound on what is held in memory.

Workers are spawned, not forked, so the parent may hold a CUDA context and threads. A worker that dies (out of memory, a
crash in a codec) costs the one picture that kills it, not the run. Pixels come back through shared memory, which saves
about a tenth of the CPU time per picture; where there is too little of it (containers often have 64 MB), through pipes.
"""

import contextlib
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from sd3pipe import stopping
from sd3pipe.cores import usable_cores
from sd3pipe.data.decoding import DecodeJob, Pixels, decode_row
from sd3pipe.data.headers import DECODER_ERRORS, reason
from sd3pipe.errors import UnreadablePicture

_AHEAD_BYTES = 512 << 20  # decoded pixels waiting for the encoder, at most
_AHEAD_PER_WORKER = 4
_SLOT_BYTES = 4 << 20  # shared memory per row: 1182 x 1182 pixels; larger rows come through a pipe
_SHARED_FOLDER = Path("/dev/shm")  # where Linux keeps shared memory, often a small file system of its own
_ENVIRONMENT = {  # of the workers
    "PYTHONSAFEPATH": "1",  # spawned by `python -c`, which would look for modules in the current folder first
    "OPENBLAS_NUM_THREADS": "1",  # for numpy's products: there are as many workers as cores
    # Linux's allocator keeps freed memory for the next picture; given back and fetched anew, its pages cost as much
    # CPU time as the decoding.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


Decoded = Pixels | UnreadablePicture


def decoded_rows(jobs: Iterable[DecodeJob], *, workers: int) -> Iterator[Decoded]:
    """Yields the pixels of each job in order; `workers` = 0 decodes in this process."""
    if workers == 0:
        yield from map(_attempt, jobs)
        return
    with contextlib.closing(_Feed(workers)) as feed:
        yield from feed.run(iter(jobs))


def default_workers() -> int:
    """Returns as many workers as there are cores this process may use, eight at the most."""
    return min(8, usable_cores())


class _Feed:
    """A pool that is made anew when a worker dies."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.environment_before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)  # spawned workers inherit it
        self.most_waiting = workers * _AHEAD_PER_WORKER
        self.block = _shared_block((self.most_waiting + 1) * _SLOT_BYTES)
        self.free_slots = list(range(self.most_waiting + 1)) if self.block else []
        self.pool = self._new_pool(workers)
        self.waiting: deque[_Waiting] = deque()

    def run(self, jobs: Iterator[DecodeJob]) -> Iterator[Decoded]:
        held_bytes = 0
        for job in jobs:
            slot = self.free_slots.pop() if self.free_slots and _row_bytes(job) <= _SLOT_BYTES else None
            self.waiting.append(_Waiting(job, slot, self._submit(self.pool, job, slot)))
            held_bytes += _row_bytes(job)
            while held_bytes > _AHEAD_BYTES or len(self.waiting) > self.most_waiting:
                held_bytes -= _row_bytes(self.waiting[0].job)
                yield self._next()
        while self.waiting:
            yield self._next()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.block is not None:
            self.block.close()
            self.block.unlink()
        for name, value in self.environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _next(self) -> Decoded:
        waiting = self.waiting.popleft()
        try:
            result = waiting.future.result()
        except BrokenProcessPool:
            result = self._after_a_death(waiting)
        if isinstance(result, _InSlot):
            assert self.block is not None and waiting.slot is not None
            result = Pixels(rgb=_slot(self.block, waiting.slot, result.shape).copy(), mask=result.mask)
        if waiting.slot is not None:
            self.free_slots.append(waiting.slot)
        return result

    def _after_a_death(self, waiting: "_Waiting") -> "_Result":
        """Decodes one job alone in a fresh worker, then sets the others going again."""
        self.pool.shutdown(cancel_futures=True)
        lone = self._new_pool(1)
        try:
            result = self._submit(lone, waiting.job, waiting.slot).result()
        except BrokenProcessPool:
            result = UnreadablePicture("it ended the process that decoded it")
        finally:
            lone.shutdown()
        self.pool = self._new_pool(self.workers)
        for number, other in enumerate(self.waiting):
            future = other.future
            if not future.done() or future.cancelled() or future.exception() is not None:
                self.waiting[number] = replace(other, future=self._submit(self.pool, other.job, other.slot))
        return result

    def _submit(self, pool: ProcessPoolExecutor, job: DecodeJob, slot: int | None) -> "Future[_Result]":
        """Returns the job's future, which fails at once where a worker has died: its turn will come."""
        try:
            with stopping.held_back():  # a worker may start, which Python's own handlers would end with a traceback
                return pool.submit(_attempt_in_worker, job, slot)
        except BrokenProcessPool as error:
            refused: Future[_Result] = Future()
            refused.set_exception(error)
            return refused

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        name = self.block.name if self.block is not None else None
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(name,))


@dataclass(frozen=True, slots=True)
class _InSlot:
    """Pixels that lie in shared memory."""

    shape: tuple[int, ...]
    mask: np.ndarray | None


_Result = Decoded | _InSlot


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A job on its way."""

    job: DecodeJob
    slot: int | None
    future: "Future[_Result]"


_block_of_worker: list[SharedMemory] = []


def _start_worker(block_name: str | None) -> None:
    """Leaves signals to the parent, which ends the workers, and opens the shared memory."""
    stopping.leave_to_parent()
    if block_name is not None:
        _block_of_worker.append(SharedMemory(name=block_name))


def _attempt_in_worker(job: DecodeJob, slot: int | None) -> _Result:
    result = _attempt(job)
    if slot is None or isinstance(result, UnreadablePicture):
        return result
    _slot(_block_of_worker[0], slot, result.rgb.shape)[...] = result.rgb
    return _InSlot(result.rgb.shape, result.mask)


def _attempt(job: DecodeJob) -> Decoded:
    try:
        return decode_row(job)
    except UnreadablePicture as error:
        return UnreadablePicture(str(error))  # without its traceback, which would hold the file's bytes
    except DECODER_ERRORS as error:
        return UnreadablePicture(f"it cannot be decoded ({type(error).__name__}: {reason(error)})")


def _shared_block(size: int) -> SharedMemory | None:
    """Returns shared memory, or None where there is not twice as much of it: beyond its end a process dies."""
    if _SHARED_FOLDER.is_dir() and shutil.disk_usage(_SHARED_FOLDER).free < 2 * size:
        return None
    try:
        return SharedMemory(create=True, size=size)
    except OSError:
        return None


def _slot(block: SharedMemory, slot: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.ndarray(shape, np.uint8, buffer=block.buf, offset=slot * _SLOT_BYTES)


def _row_bytes(job: DecodeJob) -> int:
    return 3 * job.cut.size[0] * job.cut.size[1]
