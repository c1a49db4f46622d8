"""Who watches a run is told what happens in it: one reader for all, twice a second, and none where nobody watches."""

import asyncio
import contextlib
import html
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from sd3pipe.config import Project
from sd3pipe.errors import Sd3pipeError
from sd3pipe.pages.render import render
from sd3pipe.studio.queue import Queue

if TYPE_CHECKING:
    from sd3pipe.studio.runs import RunView

_TICK_SECONDS = 0.5
_STATUS_TICKS = 3  # status, samples and log are looked at more seldom than the curve
_KEEP_ALIVE_SECONDS = 15.0
_MOST_WAITING = 200  # messages for a watcher that does not read; it comes back and says where it left off
_END = b""


class Watches:
    """The watched runs of the studio."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._watches: dict[tuple[str, str], Watch] = {}

    def of(self, project: Project, run: str) -> "Watch":
        """Returns the watch over a run of a project, as its file names it now. Raises InputError for no such run."""
        key = (str(project.folder), run)
        watch = self._watches.get(key)
        if watch is None or watch.project != project:
            from sd3pipe.studio.runs import RunView, run_place  # Pillow, which the studio starts without

            if watch is not None:
                watch.close()  # who watches comes back, and is told of the other run
            self._watches[key] = watch = Watch(project, RunView(run_place(project, run)), self._queue)
        return watch

    def close(self) -> None:
        """Ends all streams, so that the server can end."""
        for watch in self._watches.values():
            watch.close()


class Watch:
    """One run: what is known of it, and those who are told when that changes."""

    def __init__(self, project: Project, run: "RunView", queue: Queue) -> None:
        self.project, self.run, self.queue = project, run, queue
        self._watchers: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None
        self._sent = run.curves.mark
        self._told: dict[str, Any] = {}  # kind of event -> what was last said

    def stream(self, since: str) -> StreamingResponse:
        """Returns a response that tells what comes after `since`, "GENERATION:ROW" of the curve."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(since), media_type="text/event-stream", headers=headers)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(_END)

    async def _events(self, since: str) -> AsyncIterator[bytes]:
        watcher: asyncio.Queue[bytes] = asyncio.Queue(_MOST_WAITING + 10)
        self._watchers.add(watcher)  # before it is told what is known: a point may come twice, but is never missed
        first = self._since(since)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read_on())
        try:
            yield first + b"".join(_event(kind, value) for kind, value in self._told.items())
            while True:
                with contextlib.suppress(TimeoutError):
                    message = await asyncio.wait_for(watcher.get(), _KEEP_ALIVE_SECONDS)
                    if message == _END:
                        return
                    yield message
                    continue
                yield b": still here\n\n"
        finally:
            self._watchers.discard(watcher)

    async def _read_on(self) -> None:
        """Reads as long as somebody watches."""
        tick = 0
        while self._watchers:
            message = await run_in_threadpool(self._news, with_status=tick % _STATUS_TICKS == 0)
            for watcher in list(self._watchers) if message else ():
                if watcher.qsize() >= _MOST_WAITING:
                    self._watchers.discard(watcher)
                    watcher.put_nowait(_END)
                else:
                    watcher.put_nowait(message)
            tick += 1
            await asyncio.sleep(_TICK_SECONDS)

    def _news(self, *, with_status: bool) -> bytes:
        self.run.read()
        parts = [self._since(self._sent)]
        self._sent = self.run.curves.mark
        facts = self._facts() if with_status else []
        parts += [self._changed(*fact) for fact in [("validation", self.run.curves.validations), *facts]]
        return b"".join(parts)

    def _facts(self) -> list[tuple[str, Any]]:
        from sd3pipe.studio.status import status  # pydantic models of the stages, likewise

        try:
            found = status(self.project, self.queue, self.run)
        except Sd3pipeError as error:
            return [("status", f'<p class="errors">{html.escape(str(error))}</p>')]
        page = render("studio/templates/status.html", status=found)
        return [("status", page), ("samples", self.run.samples()), ("log", found.log)]

    def _changed(self, kind: str, value: Any) -> bytes:
        if self._told.get(kind) == value:
            return b""
        self._told[kind] = value.copy() if isinstance(value, list | dict) else value
        return _event(kind, value)

    def _since(self, since: str) -> bytes:
        generation, _, row = since.partition(":")
        if generation != str(self.run.curves.generation) or not row.isdigit() or int(row) > len(self.run.curves):
            return _event("reset", {}, self.run.curves.mark)
        if int(row) == len(self.run.curves):
            return b""
        return _event("points", {"from": int(row), "points": self.run.curves.points(int(row))}, self.run.curves.mark)


def _event(kind: str, value: Any, mark: str = "") -> bytes:
    """Returns one server-sent event with JSON in it."""
    head = f"id: {mark}\n" if mark else ""
    return f"{head}event: {kind}\ndata: {json.dumps(value, allow_nan=False)}\n\n".encode("utf-8", "surrogatepass")
